"""Progress of a run: a bar on a terminal, otherwise occasional lines."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from sft.spec.metrics import number

_FIRST_LINES = 3
_LINE_EVERY_SECONDS = 10.0
_LINE_EVERY_SHARE = 0.05
_MEDIAN_OF = 20


class Progress:
    """Shows the records of metrics.jsonl. `start` is the last finished iteration, 0 for a new run."""

    def __init__(
        self, console: Console, iterations: int, start: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console, self._iterations, self._start, self._clock = console, iterations, start, clock
        self._seconds: deque[float] = deque(maxlen=_MEDIAN_OF)
        self._line_at, self._line_iteration = clock(), start
        self._bar: RichProgress | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            columns = (
                TextColumn("{task.fields[count]}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[shown]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
            )
            self._bar = RichProgress(*columns, console=console, refresh_per_second=2, expand=True)
            self._task = self._bar.add_task(
                "", total=iterations, completed=start, count=self._count(start), shown="", left=""
            )

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, record: Mapping[str, Any]) -> None:
        iteration = int(record["iteration"])
        if (seconds := number(record, "seconds")) is not None:
            self._seconds.append(seconds)
        trained = "loss" in record
        if trained and self._bar:
            shown = "  ".join(_facts(record, ("loss", "tokens_per_second")))
            self._bar.update(
                self._task, completed=iteration, count=self._count(iteration), shown=shown, left=self._left(iteration)
            )
        elif trained and self._is_line_due(iteration, "val_loss" in record):
            self._line_at, self._line_iteration = self._clock(), iteration
            facts = _facts(record, ("loss", "lr", "grad_norm", "tokens_per_second"))
            self.say(
                "  ".join(
                    part for part in (f"iteration {self._count(iteration)}", *facts, self._left(iteration)) if part
                )
            )
        if "val_loss" in record:
            facts = _facts(record, ("val_loss", "val_perplexity", "val_accuracy"))
            self.say("  ".join((f"iteration {self._count(iteration)}", *facts)), style="cyan")
            for key in record:
                if key.startswith(_PART):
                    name = key.removeprefix(_PART)
                    facts = [
                        _SHOWN[measure](_shown_number(record, f"{measure}/{name}"))
                        for measure in ("val_loss", "val_perplexity", "val_accuracy")
                    ]
                    self.say("  ".join((f"  {name}", *facts)), style="cyan")

    def say(self, text: str, style: str = "") -> None:
        """Print a line above the bar."""
        self._console.print(Text(text, style), soft_wrap=True)

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}", style="yellow")

    def _is_line_due(self, iteration: int, validated: bool) -> bool:
        if validated or iteration >= self._iterations or iteration - self._start <= _FIRST_LINES:
            return True
        by_count = iteration - self._line_iteration >= _LINE_EVERY_SHARE * self._iterations
        return by_count and self._clock() - self._line_at >= _LINE_EVERY_SECONDS

    def _count(self, iteration: int) -> str:
        return f"{iteration:,}/{self._iterations:,}"

    def _left(self, iteration: int) -> str:
        return f"{duration(median(self._seconds) * max(self._iterations - iteration, 0))} left" if self._seconds else ""


def duration(seconds: float) -> str:
    """Format seconds as 1:02:10, in hours however many."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60:,}:{minutes % 60:02d}:{rest:02d}"


_PART = "val_loss/"  # a data set of several validation sets


_SHOWN: dict[str, Callable[[float], str]] = {
    "loss": "loss {:.4f}".format,
    "lr": "lr {:.1e}".format,
    "grad_norm": "grad {:.2f}".format,
    "tokens_per_second": "{:,.0f} tokens/s".format,
    "val_loss": "validation loss {:.4f}".format,
    "val_perplexity": "perplexity {:,.2f}".format,
    "val_accuracy": "accuracy {:.1%}".format,
}


def _shown_number(record: Mapping[str, Any], key: str) -> float:
    value = number(record, key)
    return float("nan") if value is None else value


def _facts(record: Mapping[str, Any], keys: tuple[str, ...]) -> list[str]:
    """Format these values of the record. Values that are not finite appear as nan, so that they are noticed."""
    return [_SHOWN[key](_shown_number(record, key)) for key in keys if key in record]
