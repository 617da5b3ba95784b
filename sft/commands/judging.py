"""The judge in `sft evaluate`: its cost, the user's consent, and its verdicts in the predictions."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # slow imports
    from sft.evaluate.evaluation import Evaluated
    from sft.evaluate.judge import Question

Record = dict[str, Any]


def judge(
    arguments: argparse.Namespace, evaluated: list[Evaluated], base: str | None, folder: Path, console: Any
) -> None:
    """Add `judge` (and `judge_wins`) to the scores of each rated prediction."""
    from rich.progress import Progress

    from sft.evaluate.answers import model_of_server
    from sft.evaluate.client import Client
    from sft.evaluate.judge import Judge, read_rubric
    from sft.evaluate.lines import LineStore
    from tokenize_data.errors import UserError

    if arguments.judge_workers < 1:
        raise UserError(f"--judge_workers {arguments.judge_workers} must be at least 1")
    client = Client(
        url=arguments.judge_url, key_variable=arguments.judge_key_env, per_minute=arguments.judge_per_minute
    )
    rubric = read_rubric(arguments.judge_rubric)
    ratings = _ratings(evaluated)
    pairs = _pairs(evaluated, base) if arguments.judge_pairwise else []
    questions = [question for _, question in ratings] + [question for _, both in pairs for question in both]
    with LineStore(folder / "judge.jsonl", lambda record: str(record["id"])) as store:
        asked = Judge(client, arguments.judge_model or model_of_server(client), rubric, store, arguments.judge_workers)
        estimate = asked.estimate(questions, tuple(arguments.judge_prices) if arguments.judge_prices else None)
        console.print(f"judge: {estimate}")
        if (
            estimate.requests
            and not arguments.yes
            and sys.stdin.isatty()
            and input("Ask the judge? [y/n] ").strip().lower() != "y"
        ):
            raise UserError("the judge was not asked; without --judge_url everything else is scored")
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("judge", total=len(questions))
            verdicts, failures = asked.ask(questions, lambda done: progress.update(task, completed=done))
    _enter(ratings, pairs, verdicts)
    if failures:
        console.print(
            f"warning: {len(failures):,} answers are not rated, such as: {failures[0]}; the same command asks again",
            style="yellow",
        )


def _ratings(evaluated: list[Evaluated]) -> list[tuple[Record, Question]]:
    from sft.evaluate.judge import Question

    rows = [row for one in evaluated for part in one.predictions.values() for row in part if row["answer"] is not None]
    return [
        (row, Question(question=row["question"], references=tuple(row["references"]), answer=row["answer"]))
        for row in rows
    ]


def _pairs(evaluated: list[Evaluated], base: str | None) -> list[tuple[Record, tuple[Question, Question]]]:
    from sft.evaluate.judge import Question, both_orders

    theirs = next(one for one in evaluated if one.label == base)
    found = []
    for one in evaluated:
        if one.label == base:
            continue
        for name, rows in one.predictions.items():
            for row, other in zip(rows, theirs.predictions[name], strict=True):
                if row["answer"] is not None and other["answer"] is not None:
                    question = Question(
                        question=row["question"],
                        references=tuple(row["references"]),
                        answer=row["answer"],
                        other=other["answer"],
                    )
                    found.append((row, both_orders(question)))
    return found


def _enter(ratings: list[Any], pairs: list[Any], verdicts: list[Record | None]) -> None:
    from sft.evaluate.judge import SCORE, preference

    for (row, _), verdict in zip(ratings, verdicts, strict=False):
        if verdict is not None:
            row["scores"]["judge"] = verdict[SCORE]
            row["judge_reason"] = verdict["reason"]
    rest = iter(verdicts[len(ratings) :])
    for row, _ in pairs:
        row["scores"]["judge_wins"] = preference(next(rest), next(rest))
