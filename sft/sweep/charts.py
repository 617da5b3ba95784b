"""Draws one chart per axis: the best validation loss by its values, one line per combination of the other axes, and
the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sft.sweep.grid import Sweep

_BLUE, _GREY = "#4c72b0", "#8c8c8c"


def write_charts(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write the charts and return the files: none if matplotlib is missing or nothing is finished."""
    measure = "best_val_loss" if any(row.get("best_val_loss") is not None for row in rows) else "train_loss"
    done = [row for row in rows if row["state"] == "finished" and row.get(measure) is not None]
    axes = [axis for axis, values in sweep.axes.items() if len(values) > 1]
    if not done:
        return []
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    written = []
    for axis in axes:
        figure = Figure(figsize=(7, 4), layout="constrained")
        _draw(
            figure.subplots(),
            axis,
            list(sweep.axes[axis]),
            [other for other in sweep.axes if other != axis],
            done,
            measure,
        )
        path = sweep.folder / f"axis-{axis}.png"
        figure.savefig(path, dpi=120, format="png")
        written.append(path)
    return written


def _draw(
    panel: Any, axis: str, labels: list[Any], others: list[str], rows: Sequence[Mapping[str, Any]], measure: str
) -> None:
    groups: dict[tuple[Any, ...], dict[Any, float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[other] for other in others), {})[row[axis]] = float(row[measure])
    for group in groups.values():
        places = [place for place, label in enumerate(labels) if label in group]
        panel.plot(
            places, [group[labels[place]] for place in places], color=_GREY, linewidth=0.8, marker=".", alpha=0.6
        )
    means = [[group[label] for group in groups.values() if label in group] for label in labels]
    places = [place for place, values in enumerate(means) if values]
    panel.plot(
        places, [float(np.mean(means[place])) for place in places], color=_BLUE, linewidth=2, marker="o", label="mean"
    )
    panel.set_xticks(range(len(labels)), [str(label) for label in labels])
    panel.set_xlabel(axis)
    panel.set_ylabel(measure.replace("_", " "))
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
