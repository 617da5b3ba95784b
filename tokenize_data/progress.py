"""A progress bar with documents, MB/s and ETA on a terminal; otherwise occasional lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_LINE_EVERY_SECONDS = 10.0


class Progress:
    """Measures progress by input bytes, since the number of rows is not known in advance."""

    def __init__(self, title: str, sizes: Sequence[int]) -> None:
        self._title, self._before, self._total = title, [sum(sizes[:index]) for index in range(len(sizes))], sum(sizes)
        self._begun = self._last = time.monotonic()
        self._bar: RichProgress | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            self._bar = RichProgress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True)
            self._task = self._bar.add_task(title, total=self._total or None, rate="")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, source: int, bytes_read: int, documents: int) -> None:
        now, done = time.monotonic(), self._before[source] + bytes_read
        seconds = max(now - self._begun, 1e-6)
        rate = f"{documents:,} documents, {done / 1e6 / seconds:.1f} MB/s"
        if self._bar:
            self._bar.update(self._task, completed=done, rate=rate, refresh=now - self._last > 0.1)
            self._last = now if now - self._last > 0.1 else self._last
        elif now - self._last > _LINE_EVERY_SECONDS:
            self._last = now
            left = (self._total - done) / done * seconds if self._total and done else 0
            print(
                f"{self._title}: {done / max(self._total, 1):.0%}, {rate}, {left:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )
