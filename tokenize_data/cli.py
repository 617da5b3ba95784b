"""`tokenize_data`: the data stage alone."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenize_data.dataset import DatasetSpec
from tokenize_data.dataset_info import expanded
from tokenize_data.errors import EXIT_OK, OneLineParser, UserError, exit_code_of
from tokenize_data.flags import add_flags, typed_values
from tokenize_data.pool import ENGINES, RAY
from tokenize_data.settings import BaseSettings, DataSettings, fields_of

if TYPE_CHECKING:
    from tokenize_data.stage import Request

_PROGRAM = "tokenize_data"
_GROUPS = {"data": DataSettings, "model": BaseSettings}
_NAMES = {title: {entry.name for entry in fields_of(group)} for title, group in _GROUPS.items()}
_LISTS = ("datasets", "val_datasets")
_MOST_WORKERS = 16


def make_parser(kind: type[OneLineParser] = OneLineParser) -> OneLineParser:
    parser = kind(
        prog=_PROGRAM,
        description="Tokenise question-answer files once: ids and roles in Arrow shards, which training maps.",
        epilog=(
            "Example: tokenize_data --run_name pubmedqa --data train.jsonl --val val.jsonl --checkpoint meditron "
            "--size 70"
        ),
    )
    add_flags(parser, _GROUPS)
    parser.add_argument("--config", type=Path, default=None, metavar="RECIPE", help="a YAML recipe; flags override it")
    parser.add_argument(
        "--workers", type=int, default=None, metavar="N", help="processes (default: one for each core, at most 16)"
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="where the processes are: on this machine, or on a Ray cluster (RAY_ADDRESS, or the one that runs here)",
    )
    parser.add_argument(
        "--part", default=None, metavar="i/N", help="make the i-th of N parts, for N machines; the last one joins them"
    )
    parser.add_argument(
        "--no_fast_tokenizer", action="store_true", help="never use tiktoken instead of the Hugging Face tokenizer"
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    from datetime import UTC, datetime

    from tokenize_data import describe, manifest, stage, stale

    def say(line: str) -> None:
        print(f"{_PROGRAM}: {line}", flush=True)

    def warn(line: str) -> None:
        print(f"{_PROGRAM}: warning: {line}", file=sys.stderr, flush=True)

    training, validation = requests_of(arguments)
    manifests: list[manifest.Manifest] = []
    is_new = is_part = False
    for request in (training, validation):
        if request is None:
            continue
        if manifests and request.split is not None and manifests[0].split:
            request = replace(request, split=replace(request.split, seed=manifests[0].split["seed"]))
        folder = manifest.dataset_folder(request.root, request.run_name)
        began = datetime.now(UTC).isoformat(timespec="seconds")
        made = stage.ensure(request, say, warn)
        if made is None:
            is_part = True
            continue
        manifests.append(made)
        if request.is_validation and not is_part:
            stale.refuse_other_files(manifests[0], made, folder)
        for line in describe.summary(made, folder, is_new=made.created >= began):
            say(line)
        for line in describe.warnings(made):
            warn(line)
        is_new = is_new or made.created >= began
    if is_new and not is_part:
        _check(training, validation, warn)
    return EXIT_OK


def _check(training: Request, validation: Request | None, warn: Callable[[str], None]) -> None:
    """Run the cheap checks on new data."""
    from tokenize_data.checks.quick import quick
    from tokenize_data.manifest import dataset_folder
    from tokenize_data.reader import ShardReader

    readers = [
        ShardReader(dataset_folder(request.root, request.run_name)) if request is not None else None
        for request in (training, validation)
    ]
    assert readers[0] is not None
    for finding in quick(readers[0], readers[1]):
        warn(finding.line())


def requests_of(arguments: argparse.Namespace) -> tuple[Request, Request | None]:
    """Returns the requests (training, validation or None) from flags and recipe."""
    from tokenize_data import manifest
    from tokenize_data.bases import find_base
    from tokenize_data.parts import PartOf
    from tokenize_data.split import Split, share_of
    from tokenize_data.stage import Request
    from tokenize_data.templates import template_values

    data, base = settings_of(arguments)
    part = PartOf.parse(arguments.part) if arguments.part is not None else None
    if part is not None and data.append:
        raise UserError("--part makes a new data set and --append adds to one: give one of them")
    workers = None if arguments.engine == RAY else _cores()
    checkpoints_file = Path(base.checkpoints_file) if base.checkpoints_file else None
    training = Request(
        run_name=data.run_name,
        root=Path(data.tokenized_data_dir),
        base=find_base(base.checkpoint, base.size, checkpoints_file),
        specs=_ready(data, (_spec(data, data.data, samples=data.samples),) if data.data else data.datasets),
        template=data.template,
        template_values=template_values(data.chat_template_kwargs),
        seq=data.seq,
        workers=arguments.workers if arguments.workers is not None else workers,
        engine=arguments.engine,
        max_bad_rows=data.max_bad_rows,
        retokenize=data.retokenize,
        append=data.append,
        part=part,
        seed=data.seed,
        fast=not arguments.no_fast_tokenizer,
    )
    name = f"{data.run_name}-val"
    wanted = share_of(data.val, data.val_group)
    if wanted is not None and data.append:
        raise UserError(f"--val {wanted} is drawn from all rows, so --append cannot add to it: name files with --val")
    if wanted is not None:
        training = replace(training, split=Split(wanted=wanted, seed=data.seed, group=data.val_group))
        whole = tuple(replace(spec, samples=None, weight=1.0, weight_key=None) for spec in training.specs)
        return training, replace(training, run_name=name, specs=whole, is_validation=True)
    specs = _ready(data, (_spec(data, data.val),) if data.val else data.val_datasets)
    if not specs:
        return training, None
    is_there = data.append and manifest.read(training.root / name) is not None  # otherwise --append creates it
    return training, replace(training, run_name=name, specs=specs, append=is_there)


def settings_of(arguments: argparse.Namespace) -> tuple[DataSettings, BaseSettings]:
    """The typed values on top of the recipe that --config names."""
    typed = typed_values(arguments, _NAMES["data"] | _NAMES["model"])
    values = {**_from_recipe(arguments.config, typed), **typed} if arguments.config else typed
    if "run_name" not in values:
        raise UserError("--run_name is missing: it names the data set, such as --run_name pubmedqa")
    data, model = ({name: values[name] for name in names & values.keys()} for names in _NAMES.values())
    return DataSettings(**data), BaseSettings(**model)


def _from_recipe(file: Path, typed: dict[str, Any]) -> dict[str, Any]:
    """The recipe's keys that this command has; the others are for training."""
    from tokenize_data.recipe import read_data

    recipe = read_data(file)
    words: list[str] = []
    for name, value in recipe.others.items():
        if name not in _NAMES["data"] | _NAMES["model"] or name in typed or value is None:
            continue
        if isinstance(value, dict):
            words += [f"--{name}", json.dumps(value)]
        elif isinstance(value, bool):
            words += [f"--{name}"] if value else []
        else:
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    found = typed_values(make_parser().parse(words), _NAMES["data"] | _NAMES["model"])
    return found | {
        name: specs for name, specs in zip(_LISTS, (recipe.training, recipe.validation), strict=True) if specs
    }


def _spec(data: DataSettings, files: tuple[str, ...], samples: int | None = None) -> DatasetSpec:
    return DatasetSpec(
        files=files,
        name="",
        format=data.format,
        question_key=data.question_key,
        answer_key=data.answer_key,
        system_key=data.system_key,
        text_key=data.text_key,
        train_on=data.train_on,
        weight_key=data.weight_key,
        samples=samples,
    )


def _ready(data: DataSettings, specs: tuple[DatasetSpec, ...]) -> tuple[DatasetSpec, ...]:
    """With entries of a dataset_info.json in place of their names, and the run's truncation where there is none."""
    return tuple(spec.truncated(data.truncate, data.truncate_side) for spec in expanded(specs))


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS)


def entry(argv: list[str] | None = None) -> int:
    return exit_code_of(_PROGRAM, lambda: run(make_parser().parse(sys.argv[1:] if argv is None else argv)))
