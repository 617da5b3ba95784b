"""Document lengths as a histogram, in the terminal and as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.text import Text

from tokenize_data.errors import UserError

_WIDTH = 48


def bins(lengths: np.ndarray, num_bins: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Returns (counts, edges) with round edges, starting at 0 unless the lengths are close together."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    first = shortest if shortest > longest // 2 else 0
    step = max(-(-(longest + 1 - first) // num_bins), 1)
    magnitude = 10 ** max(len(str(step)) - 2, 0)
    step = -(-step // magnitude) * magnitude
    first -= first % step
    edges = np.arange(first, longest + step + 1, step)
    counts, _ = np.histogram(lengths, bins=edges)
    return counts, edges


def bars(lengths: np.ndarray, seq: int) -> RenderableType:
    counts, edges = bins(lengths)
    low, middle, high = np.percentile(lengths, [5, 50, 95]).astype(int)
    title = (
        f"tokens a document: 5 % {low:,}, median {middle:,}, 95 % {high:,}, longest {int(lengths.max()):,} of {seq:,}"
    )
    lines = [Text(title)]
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        full = round(float(count / counts.max()) * _WIDTH * 8)
        bar = "█" * (full // 8) + ("" if full % 8 == 0 else "▏▎▍▌▋▊▉"[full % 8 - 1])
        shown = bar or ("▏" if count else "")
        lines.append(
            Text.assemble((f"{left:>7,}-{right - 1:<7,}", "dim"), (f"{shown:<{_WIDTH + 1}}", "green"), f"{count:,}")
        )
    return Group(Rule("lengths", align="left", style="dim"), *lines)


def write_chart(lengths: np.ndarray, trained: np.ndarray, seq: int, file: Path) -> None:
    """Draw a PNG with lengths and trained tokens."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--chart needs matplotlib: pip install 'megasft[plots]'") from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = (("tokens a document", lengths, "#4c72b0"), ("trained tokens a document", trained, "#55a868"))
    for axes, (title, values, colour) in zip(figure.subplots(1, 2), panels, strict=True):
        _, edges = bins(values, 40)
        axes.hist(values, bins=edges.tolist(), color=colour)
        axes.axvline(float(np.median(values)), color="#222222", linewidth=1, label=f"median {int(np.median(values)):,}")
        if values.max() > 0.5 * seq:
            axes.axvline(seq, color="#c44e52", linestyle="--", label=f"--seq {seq:,}")
        axes.set_xlabel(title)
        axes.set_ylabel("documents")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(
        f"{len(lengths):,} documents, {int(lengths.sum()):,} tokens, {trained.sum() / lengths.sum():.1%} trained"
    )
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--chart {file}: {getattr(error, 'strerror', None) or error}: give the path of a .png file"
        ) from error
