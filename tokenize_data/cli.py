"""`tokenize_data`: the data stage alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tokenize_data.errors import EXIT_OK, OneLineParser, UserError, exit_code_of

_PROGRAM = "tokenize_data"
_RECIPE_KEYS = {
    "run_name",
    "tokenized_data_dir",
    "data",
    "val",
    "checkpoint",
    "size",
    "checkpoints_file",
    "question_key",
    "answer_key",
    "system_key",
    "text_key",
    "format",
    "template",
    "seq",
    "max_bad_rows",
    "samples",
    "seed",
}


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what data a run has; training has the same ones."""
    parser.add_argument(
        "--run_name", default=None, metavar="R", help="name of the data set: letters, digits, . _ - (required)"
    )
    parser.add_argument(
        "--tokenized_data_dir", default="tokenized", metavar="D", help="root of the shards (default: tokenized)"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE",
        help="JSONL (.gz, .zst), JSON, CSV, Parquet, a folder or a Hub data set",
    )
    parser.add_argument("--val", nargs="*", default=[], metavar="FILE", help="the same for validation; becomes R-val")
    parser.add_argument(
        "--checkpoint", default="baseline", metavar="NAME", help="base model: an entry of checkpoints.toml or a folder"
    )
    parser.add_argument("--size", default=None, metavar="S", help="size of the entry (default: 7)")
    parser.add_argument(
        "--checkpoints_file",
        type=Path,
        default=None,
        metavar="F",
        help="default: ./checkpoints.toml, else the packaged one",
    )
    parser.add_argument("--question_key", default="prompt", metavar="K", help="key of the question (default: prompt)")
    parser.add_argument("--answer_key", default="gold", metavar="K", help="key of the answer (default: gold)")
    parser.add_argument("--system_key", default=None, metavar="K", help="key of the system message (default: none)")
    parser.add_argument("--text_key", default="text", metavar="K", help="key of plain text rows (default: text)")
    parser.add_argument(
        "--format", default=None, metavar="F", help="qa, chat, sharegpt, alpaca or text (default: from the first rows)"
    )
    parser.add_argument(
        "--template",
        default="auto",
        metavar="T",
        help="auto, a packaged template's name, or a Jinja file (default: auto)",
    )
    parser.add_argument("--seq", type=int, default=2048, metavar="L", help="longest document in tokens (default: 2048)")
    parser.add_argument(
        "--max_bad_rows",
        type=int,
        default=0,
        metavar="N",
        help="set up to N bad rows aside in rejected.jsonl (default: 0)",
    )
    parser.add_argument(
        "--samples", type=int, default=None, metavar="N", help="take N rows of --data, drawn by --seed (default: all)"
    )
    parser.add_argument(
        "--retokenize", action="store_true", help="make the shards anew, and replace the old ones at the end"
    )
    parser.add_argument("--seed", type=int, default=1234, help="for samples and weights (default: 1234)")


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=_PROGRAM,
        description="Question-answer files to token ids with roles, once, in Arrow shards that training maps.",
        epilog=(
            "Example: tokenize_data --run_name pubmedqa --data train.jsonl --val val.jsonl --checkpoint meditron "
            "--size 70"
        ),
    )
    add_data_flags(parser)
    parser.add_argument(
        "--config", type=Path, default=None, metavar="RECIPE", help="a YAML recipe; a flag wins over it"
    )
    parser.add_argument(
        "--workers", type=int, default=None, metavar="N", help="processes (default: one for each core, at most 16)"
    )
    parser.add_argument(
        "--no_fast_tokenizer", action="store_true", help="never use tiktoken instead of the Hugging Face tokenizer"
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    from datetime import UTC, datetime

    from tokenize_data import describe, manifest, stage

    def say(line: str) -> None:
        print(f"{_PROGRAM}: {line}", flush=True)

    def warn(line: str) -> None:
        print(f"{_PROGRAM}: warning: {line}", file=sys.stderr, flush=True)

    training, validation = requests_of(arguments)
    for request in (training, validation):
        if request is None:
            continue
        folder = manifest.dataset_folder(request.root, request.run_name)
        began = datetime.now(UTC).isoformat(timespec="seconds")
        made = stage.ensure(request, say, warn)
        for line in describe.summary(made, folder, is_new=made.created >= began):
            say(line)
        for line in describe.warnings(made):
            warn(line)
    return EXIT_OK


def requests_of(arguments: argparse.Namespace):  # type: ignore[no-untyped-def]  # its types are imported late, for a quick -h
    """(training, validation or None) as stage.Request."""
    import os
    from dataclasses import replace

    from tokenize_data.bases import find_base
    from tokenize_data.names import check_run_name
    from tokenize_data.recipe import read_data
    from tokenize_data.records import DatasetSpec
    from tokenize_data.stage import Request

    recipe = read_data(arguments.config) if arguments.config else None
    if recipe is not None:
        arguments = _with_recipe(arguments, recipe.others)
    if arguments.run_name is None:
        raise UserError("--run_name is missing: it names the data set, such as --run_name pubmedqa")
    check_run_name(arguments.run_name)
    specs, val_specs = (recipe.training, recipe.validation) if recipe is not None else ((), ())
    if specs and arguments.data:
        raise UserError(f"--data and the datasets of {arguments.config} both name the data: give one of them")
    base_spec = DatasetSpec(
        files=("-",),
        name="",
        format=arguments.format,
        question_key=arguments.question_key,
        answer_key=arguments.answer_key,
        system_key=arguments.system_key,
        text_key=arguments.text_key,
    )
    if arguments.data:
        specs = (replace(base_spec, files=tuple(arguments.data), samples=arguments.samples),)
    elif specs and arguments.samples is not None:
        raise UserError(
            f"--samples {arguments.samples} goes with --data: here, give each of the datasets its own 'samples'"
        )
    cores = min(len(os.sched_getaffinity(0)), 16) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    training = Request(
        run_name=arguments.run_name,
        root=Path(arguments.tokenized_data_dir),
        base=find_base(arguments.checkpoint, arguments.size, arguments.checkpoints_file),
        specs=specs,
        template=arguments.template,
        seq=arguments.seq,
        workers=arguments.workers if arguments.workers is not None else cores,
        max_bad_rows=arguments.max_bad_rows,
        retokenize=arguments.retokenize,
        seed=arguments.seed,
        fast=not arguments.no_fast_tokenizer,
    )
    if arguments.val:
        val_specs = (replace(base_spec, files=tuple(arguments.val)),)
    return training, replace(training, run_name=f"{arguments.run_name}-val", specs=val_specs) if val_specs else None


def _with_recipe(arguments: argparse.Namespace, values: dict[str, Any]) -> argparse.Namespace:
    """The flags that were not typed, from the recipe's keys of the same name. Its other keys belong to training."""
    found = []
    for name in _RECIPE_KEYS & values.keys() - arguments.typed:
        value = values[name]
        found += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return argparse.Namespace(
        **{**vars(make_parser().parse_args(found)), **{name: getattr(arguments, name) for name in arguments.typed}}
    )


def entry(argv: list[str] | None = None) -> int:
    return exit_code_of(_PROGRAM, lambda: run(_arguments(argv)))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    """With the names of those that were `typed`."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    untyped = object()
    marked = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(arguments), untyped)))
    arguments.typed = {name for name, value in vars(marked).items() if value is not untyped}
    return arguments
