"""`sft evaluate MODEL_DIR --data FILE`: scores of one or several models with confidence intervals, compared with a
base.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.commands import asking

if TYPE_CHECKING:  # slow imports
    from sft.evaluate.evaluation import Evaluated
    from sft.evaluate.models import ModelPlace
    from tokenize_data.examples import Examples

EXIT_INTERRUPTED = 130


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="+", metavar="MODEL_DIR", help="a run's folder, a Hugging Face folder, an adapter, ...; several"
    )
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="FILE", help="rows with questions and answers; each file a data set"
    )
    parser.add_argument(
        "--compare",
        default=None,
        metavar="BASE",
        help="a model to compare with; `base` is the one that MODEL_DIR was trained from",
    )
    parser.add_argument(
        "--out", type=Path, default=None, metavar="DIR", help="default: evaluation/ of the run, else ./evaluation"
    )
    parser.add_argument(
        "--no_answers", action="store_true", help="likelihoods only (perplexity, choices): nothing is generated"
    )
    parser.add_argument("--no_likelihood", action="store_true", help="answers only: no perplexity")
    parser.add_argument(
        "--seq", type=int, default=None, metavar="L", help="cut documents as in training (default: its --seq)"
    )
    asking.add_row_flags(parser)
    asking.add_writing_flags(parser)
    asking.add_model_flags(parser)
    group = parser.add_argument_group("judge")
    group.add_argument(
        "--judge_url", default=None, metavar="URL", help="an OpenAI-compatible server whose model rates the answers"
    )
    group.add_argument(
        "--judge_model", default=None, metavar="NAME", help="the judge's model (default: the only one of the server)"
    )
    group.add_argument(
        "--judge_rubric",
        type=Path,
        default=None,
        metavar="FILE",
        help="text file with the criteria (default: correctness)",
    )
    group.add_argument(
        "--judge_key_env", default="OPENAI_API_KEY", metavar="VAR", help="environment variable with its key, if any"
    )
    group.add_argument("--judge_workers", type=int, default=4, metavar="N", help="requests at once (default: 4)")
    group.add_argument(
        "--judge_per_minute", type=float, default=float("inf"), metavar="N", help="maximum requests per minute"
    )
    group.add_argument(
        "--judge_prices", type=float, nargs=2, default=None, metavar=("IN", "OUT"), help="price of a million tokens"
    )
    group.add_argument(
        "--judge_pairwise", action="store_true", help="also compare each answer with the base's, in both orders"
    )
    group.add_argument("--yes", action="store_true", help="do not ask whether to pay the judge")


def run(arguments: argparse.Namespace) -> int:
    try:
        evaluate(arguments)
    except KeyboardInterrupt:
        sys.stdout.write("interrupted; run the same command to resume\n")
        return EXIT_INTERRUPTED
    return 0


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ask, score, write the files and show the table. Returns the content of scores.json."""
    asking.silence_libraries()
    from rich.console import Console

    from sft.evaluate.models import find_model
    from tokenize_data.errors import UserError

    if not arguments.data and arguments.config is None:
        raise UserError("nothing to evaluate on: give --data FILE, or --config with a datasets: list")
    if arguments.no_answers and (arguments.no_likelihood or arguments.judge_url):
        raise UserError("--no_answers leaves nothing for --no_likelihood or --judge_url: leave one of them out")
    if arguments.server_url is not None and (len(arguments.models) > 1 or arguments.compare is not None):
        raise UserError(
            "--server_url serves one model: evaluate each by itself, and compare files made with --no_likelihood"
        )
    if arguments.judge_pairwise and (arguments.judge_url is None or arguments.compare is None):
        raise UserError("--judge_pairwise needs --judge_url and --compare")
    console = Console(highlight=False, soft_wrap=True)
    return _evaluate(arguments, [find_model(given) for given in arguments.models], console)


def _evaluate(arguments: argparse.Namespace, places: list[ModelPlace], console: Any) -> dict[str, Any]:
    from sft.evaluate import evaluation
    from sft.evaluate.lines import finite
    from sft.evaluate.models import base_of, find_model
    from sft.evaluate.questions import specs_for
    from tokenize_data.examples import read_examples

    first = places[0]
    if arguments.compare is not None:
        given = base_of(first) if arguments.compare == "base" else arguments.compare
        base = find_model(given)
        places = [_renamed(base, "base" if arguments.compare == "base" else base.label, places), *places]
    labels = _labels(places)
    specs = specs_for(arguments.data, vars(arguments), first.training, arguments.config)
    groups = [read_examples(spec, answers_needed=True, limit=arguments.limit) for spec in specs]
    for group in groups:
        console.print(f"{group.name}: {len(group.rows):,} rows; {group.description}", style="dim")
    folder = arguments.out or (first.run / "evaluation" if first.run is not None else Path("evaluation"))
    evaluated = _collect_all(arguments, places, labels, groups, folder, console)
    base_label = labels[0] if arguments.compare is not None else None
    if arguments.judge_url is not None:
        from sft.commands import judging

        judging.judge(arguments, evaluated, base_label, folder, console)
    processes = len(os.sched_getaffinity(0))
    evaluated = [evaluation.measure_all(one.label, one.model, one.predictions, processes) for one in evaluated]
    facts = {"command": ["sft", "evaluate", *arguments.argv], "data": [name for spec in specs for name in spec.files]}
    summary: dict[str, Any] = finite(evaluation.summary(evaluated, base_label, facts))
    _write(summary, evaluated, folder, console)
    if first.run is not None and arguments.out is None:
        _refresh_report(first.run, console)
    return summary


def _refresh_report(run: Path, console: Any) -> None:
    """Update the run's report with scores and answers."""
    from sft.observe import report
    from tokenize_data.errors import UserError

    try:
        report.write_report([run], run / "report.html")
        console.print(f"report    {run / 'report.html'}")
    except UserError as error:  # not a complete run folder
        console.print(f"warning: {run / 'report.html'} was not written: {error}", style="yellow")


def _collect_all(
    arguments: argparse.Namespace,
    places: list[ModelPlace],
    labels: list[str],
    groups: list[Examples],
    folder: Path,
    console: Any,
) -> list[Evaluated]:
    from sft.evaluate import evaluation
    from sft.evaluate.answers import LocalAsker

    sampling = asking.sampling_of(arguments)
    seq = arguments.seq or next((s for place in places if (s := (place.training.get("config") or {}).get("seq"))), None)
    borrowed = asking.template_of(places[-1], arguments) if len(places) > 1 else None
    found = []
    for place, label in zip(places, labels, strict=True):
        with _progress(console) as tell:
            options: dict[str, Any] = {}
            if arguments.server_url is not None:
                asker: Any = asking.server_asker(arguments, place, sampling)
            else:
                loaded = asking.load(place, arguments, console, borrowed)
                size = asking.batch_size_of(arguments, loaded.model.device.type)
                asker = None if arguments.no_answers else LocalAsker(loaded, sampling, size)
                if not arguments.no_likelihood:
                    identity = [place.fingerprint, str(loaded.model.dtype), loaded.format.description]
                    options = {"model": loaded.model, "chat": loaded.format, "seq": seq, "identity": identity}
            rows = evaluation.collect(label, asker, groups, folder, tell, **options)
            loaded = asker = options = None  # type: ignore[assignment]  # the next model needs the memory
        found.append(evaluation.Evaluated(label=label, model=str(place.adapter or place.folder), predictions=rows))
    return found


@contextmanager
def _progress(console: Any) -> Any:
    from rich.progress import Progress

    tasks: dict[str, Any] = {}
    with Progress(console=console, transient=True) as progress:

        def tell(title: str, done: int, *, total: int) -> None:
            if title not in tasks:
                tasks[title] = progress.add_task(title, total=total)
            progress.update(tasks[title], completed=done)

        yield tell


def _write(summary: dict[str, Any], evaluated: list[Evaluated], folder: Path, console: Any) -> None:
    from sft.evaluate import evaluation, tables
    from sft.evaluate.lines import write_json, write_text

    console.print(tables.terminal(summary), soft_wrap=False)  # as wide as the terminal
    evaluation.write_predictions(evaluated, folder / "predictions.jsonl")
    write_json(folder / "scores.json", summary)
    written = ["scores.json", "predictions.jsonl"]
    if len(evaluated) > 1:
        write_text(folder / "comparison.csv", tables.as_csv(summary))
        write_text(folder / "comparison.html", tables.as_html(summary))
        tables.write_xlsx(summary, folder / "comparison.xlsx")
        written += ["comparison.csv", "comparison.html", "comparison.xlsx"]
    console.print(f"written to {folder}: {', '.join(written)}")
    for one in evaluated:
        everything = [row for part in one.predictions.values() for row in part]
        if uncounted := sum("nll" in row and row["nll"] is None for row in everything):
            console.print(
                f"warning: {uncounted:,} rows are cut before their answer (--seq) and do not count in the perplexity",
                style="yellow",
            )
        rows = [row for row in everything if row.get("finish") is not None]
        cut = sum(row["finish"] == "length" for row in rows)
        if cut > len(rows) // 10:
            console.print(
                f"warning: {cut:,} of {one.label}'s {len(rows):,} answers are cut at --max_tokens", style="yellow"
            )
    sys.stdout.flush()


def _labels(places: list[ModelPlace]) -> list[str]:
    labels: list[str] = []
    for place in places:
        label, number = place.label, 2
        while label in labels:
            label, number = f"{place.label} {number}", number + 1
        labels.append(label)
    return labels


def _renamed(place: ModelPlace, label: str, others: list[ModelPlace]) -> ModelPlace:
    from dataclasses import replace

    is_long_hash = len(label) > 40  # the folder of a converted GGUF file
    return replace(place, label="base" if is_long_hash else label)
