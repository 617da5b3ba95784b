"""Lists all runs below a folder, one row each. Damaged files leave their columns empty."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from sft.observe.progress import duration
from sft.spec import metrics
from sft.spec.run_folder import is_finished, read_run_toml, read_status
from tokenize_data.errors import UserError

_MARKS = ("status.json", "run.toml", "run.json", "metrics.jsonl")  # files that mark a run's folder


def runs_below(folder: Path) -> list[dict[str, Any]]:
    """The runs below a folder, sorted by name."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: give the folder that holds runs, such as checkpoints")
    return [_row(run, folder) for run in _run_folders(folder)]


def is_run(folder: Path) -> bool:
    """Whether the folder has a run's files."""
    return any((folder / mark).is_file() for mark in _MARKS)


def runs_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("run", overflow="fold", min_width=12)
    table.add_column("state", no_wrap=True)
    for title in ("iteration", "loss", "val loss", "time"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("base", overflow="fold", min_width=8)
    for row in rows:
        table.add_row(
            row["name"],
            row["state"],
            f"{_shown(row['iteration'])}/{_shown(row['iterations'])}",
            *(_loss(row[name]) for name in ("loss", "val_loss")),
            "-" if row["seconds"] is None else duration(row["seconds"]),
            row["base"] or "-",
        )
    return table


def _run_folders(folder: Path) -> Iterator[Path]:
    """Find run folders, without following links or searching inside runs."""
    for place, below, files in os.walk(folder):
        if any(mark in files for mark in _MARKS):
            below.clear()
            yield Path(place)
        below.sort()


def _row(run: Path, root: Path) -> dict[str, Any]:
    table = read_run_toml(run)
    config, resolved = (part if isinstance(part := table.get(name), dict) else {} for name in ("config", "resolved"))
    records = _records(run)
    status = read_status(run) or {}
    iterations = status.get("iterations", resolved.get("iterations"))
    spent = [
        seconds
        for record in records
        for key in ("seconds", "val_seconds")
        if (seconds := metrics.number(record, key)) is not None
    ]
    reason = status.get("reason")
    return {
        "name": str(run.relative_to(root)) if run != root else run.resolve().name,
        "folder": str(run),
        "state": status.get("state") or ("finished" if is_finished(run) else "unknown"),
        "iteration": records[-1]["iteration"] if records else status.get("iteration"),
        "iterations": iterations if isinstance(iterations, int) else None,
        "loss": _last(records, "loss"),
        "val_loss": _last(records, "val_loss"),
        "seconds": round(sum(spent), 2) if spent else None,
        "base": _base(config, resolved),
        "reason": reason if isinstance(reason, str) else "",
    }


def _records(run: Path) -> list[dict[str, Any]]:
    try:
        return metrics.read(run / "metrics.jsonl")
    except UserError:  # a directory of that name, or another user's file
        return []


def _last(records: Sequence[dict[str, Any]], key: str) -> float | None:
    return next((value for record in reversed(records) if (value := metrics.number(record, key)) is not None), None)


def _base(config: dict[str, Any], resolved: dict[str, Any]) -> str | None:
    size = config.get("size")
    name = config.get("checkpoint") or resolved.get("base")
    return None if name is None else f"{name} {size}" if size else str(name)


def _shown(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
