"""loss.png: the loss over the iterations, with the learning rate below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sft.spec.metrics import number
from tokenize_data.errors import UserError

_PART, _MOST_PARTS = "val_loss/", 8  # a data set of several validation sets
_FEW = 20  # mark points up to this number, so that a single one is visible
_BLUE, _RED, _GREY = "#4c72b0", "#c44e52", "#8c8c8c"
_LOWER = (("lr", "learning rate"), ("grad_norm", "gradient norm"))


def write_loss_chart(records: Sequence[Mapping[str, Any]], path: Path, mark_best: bool = False) -> bool:
    """Draw loss.png and mark the best model. Returns False, without a file, if matplotlib is missing or no loss is
    finite.
    """
    train, val = series(records, "loss"), series(records, "val_loss")
    if not (np.isfinite(train[1]).any() or np.isfinite(val[1]).any()):
        return False
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return False
    lower = [(label, points) for key, label in _LOWER if np.isfinite((points := series(records, key))[1]).any()][:1]
    figure = Figure(figsize=(9, 5.5 if lower else 4), layout="constrained")
    panels = figure.subplots(1 + len(lower), 1, sharex=True, squeeze=False, height_ratios=[3, 1][: 1 + len(lower)])[
        :, 0
    ]
    _draw_losses(panels[0], train, val, parts_of(records))
    if mark_best and (best := best_of(val)) is not None:
        _mark_best(panels, best, int(max(train[0].max(initial=0), best[0])))
    for axes, (label, points) in zip(panels[1:], lower, strict=True):
        axes.plot(*points, color=_GREY, linewidth=1, marker=_marker(points[1]))
        axes.set_ylabel(label)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlabel("iteration")
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}: check the folder and the free disk space") from error
    return True


def series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(iterations, values) of the records with this key; NaN for values that are not finite."""
    pairs = [
        (int(record["iteration"]), number(record, key)) for record in records if key in record and "iteration" in record
    ]
    values = [np.nan if value is None else value for _, value in pairs]
    return np.array([iteration for iteration, _ in pairs], dtype=np.int64), np.array(values, dtype=np.float64)


def parts_of(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The validation losses of several data sets."""
    names = dict.fromkeys(key.removeprefix(_PART) for record in records for key in record if key.startswith(_PART))
    return {name: series(records, f"{_PART}{name}") for name in list(names)[:_MOST_PARTS]}


def best_of(val: tuple[np.ndarray, np.ndarray]) -> tuple[int, float] | None:
    """(iteration, loss) of the lowest validation loss; the first one if several are equal."""
    if not np.isfinite(val[1]).any():
        return None
    at = int(np.nanargmin(val[1]))
    return int(val[0][at]), float(val[1][at])


def smooth(values: np.ndarray) -> np.ndarray:
    """Smooth by the mean over a window of a fiftieth of the points. Values that are not finite are ignored."""
    window = 2 * (len(values) // 100) + 1
    finite = np.isfinite(values)
    kernel = np.ones(window)
    totals = np.convolve(np.where(finite, values, 0.0), kernel, "same")
    counts = np.convolve(finite.astype(np.float64), kernel, "same")
    return np.where(finite, totals / np.maximum(counts, 1.0), np.nan)


def _draw_losses(
    axes: Any,
    train: tuple[np.ndarray, np.ndarray],
    val: tuple[np.ndarray, np.ndarray],
    parts: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> None:
    if len(train[0]):
        axes.plot(*train, color=_BLUE, alpha=0.35, linewidth=0.7, marker=_marker(train[1]), label="training")
        if len(train[0]) >= 100:
            axes.plot(train[0], smooth(train[1]), color=_BLUE, linewidth=1.6, label="training, smoothed")
    finite = np.isfinite(val[1])
    if finite.any():
        axes.plot(val[0][finite], val[1][finite], color=_RED, linewidth=1, marker="o", markersize=4, label="validation")
    for style, (name, points) in zip(("--", ":", "-.") * _MOST_PARTS, parts.items(), strict=False):
        axes.plot(*points, color=_RED, alpha=0.6, linewidth=0.9, linestyle=style, marker=".", label=name)
    axes.set_ylabel("loss")
    axes.legend(frameon=False)


def _mark_best(panels: Any, best: tuple[int, float], last: int) -> None:
    iteration, loss = best
    for axes in panels:
        axes.axvline(iteration, color=_RED, linewidth=0.8, linestyle="--")
    end = f", stopped after {last:,}" if last > iteration else ""
    panels[0].plot(
        [iteration],
        [loss],
        color=_RED,
        marker="*",
        markersize=13,
        linestyle="",
        label=f"kept: iteration {iteration:,}{end}",
    )
    panels[0].legend(frameon=False)


def _marker(values: np.ndarray) -> str:
    return "." if np.isfinite(values).sum() <= _FEW else ""
