"""A sweep's results, as a table and as sweep.csv: one row per trial, from the runs' own files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from sft.observe.progress import duration
from sft.spec import metrics, run_folder
from sft.sweep.grid import Sweep, Trial
from sft.sweep.trials import record_of, run_of, state_of

SCORES = "scores.json"  # files in the run's folder with scores of the model
_MEASURED = (
    "state",
    "iterations",
    "best_val_loss",
    "best_iteration",
    "val_loss",
    "val_perplexity",
    "val_accuracy",
    "train_loss",
)
_DEEPEST = 40  # underscores of a score's name
_LAST = ("seconds", "failures", "run", "reason")


def rows(sweep: Sweep) -> list[dict[str, Any]]:
    """One row per trial, in the order of the grid."""
    return [_row(sweep, trial) for trial in sweep.trials]


def write_csv(sweep: Sweep, found: Sequence[Mapping[str, Any]]) -> Path:
    path = sweep.folder / "sweep.csv"
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(sweep, found), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row} for row in found)
    run_folder.replace_file(path, text.getvalue())
    return path


def table(sweep: Sweep, found: Sequence[Mapping[str, Any]]) -> Table:
    """A table with the best trial first, and trials without a loss last."""
    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    axes, scores = list(sweep.axes), [name for name in _columns(sweep, found) if name.startswith("score_")]
    columns = [*axes, "state", "iterations", "best_val_loss", "val_accuracy", "train_loss", *scores, "seconds"]
    for name in columns:
        is_number = name not in (*axes, "state")
        shown.add_column(name.replace("_", " "), justify="right" if is_number else "left", no_wrap=True)
    for row in sorted(found, key=_rank):
        shown.add_row(
            *[_shown(name, row.get(name)) for name in columns], style="" if row["state"] == "finished" else "dim"
        )
    return shown


def _rank(row: Mapping[str, Any]) -> tuple[bool, float]:
    loss = row.get("best_val_loss", row.get("train_loss"))
    return (row["state"] != "finished", float(loss) if isinstance(loss, int | float) else float("inf"))


def _row(sweep: Sweep, trial: Trial) -> dict[str, Any]:
    run, record = run_of(trial), record_of(sweep, trial)
    row: dict[str, Any] = {
        "trial": trial.name,
        **trial.labels,
        "state": state_of(sweep, trial),
        "failures": record.failures,
    }
    row["reason"] = "" if row["state"] == "finished" else record.reason
    if run is None:
        return row
    records = metrics.read(run / "metrics.jsonl")
    validated = [
        (loss, record["iteration"]) for record in records if (loss := metrics.number(record, "val_loss")) is not None
    ]
    if validated:
        row["best_val_loss"], row["best_iteration"] = min(validated)
    for key in ("val_loss", "val_perplexity", "val_accuracy", "train_loss"):
        values = [
            value for record in records if (value := metrics.number(record, key.removeprefix("train_"))) is not None
        ]
        row |= {key: values[-1]} if values else {}
    row["iterations"] = records[-1]["iteration"] if records else 0
    row["seconds"] = round(
        sum(metrics.number(record, key) or 0.0 for record in records for key in ("seconds", "val_seconds")), 2
    )
    return {**row, **_scores(run), "run": str(run)}


def _scores(run: Path) -> dict[str, float]:
    """The numbers in scores.json; nested ones are joined with their parent's name."""
    try:
        content = json.loads((run / SCORES).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return dict(_numbers("score", content))


def _numbers(name: str, content: Any) -> list[tuple[str, float]]:
    if isinstance(content, dict) and name.count("_") < _DEEPEST:
        return [pair for key, value in content.items() for pair in _numbers(f"{name}_{key}", value)]
    return [(name, content)] if isinstance(content, int | float) and not isinstance(content, bool) else []


def _columns(sweep: Sweep, found: Sequence[Mapping[str, Any]]) -> list[str]:
    scores = dict.fromkeys(name for row in found for name in row if name.startswith("score_"))
    return ["trial", *sweep.axes, *_MEASURED, *scores, *_LAST]


def _shown(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name == "seconds":
        return duration(float(value))
    if isinstance(value, float):
        return f"{value:.1%}" if name == "val_accuracy" else f"{value:.4f}"
    return str(value)
