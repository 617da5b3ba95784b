"""Ends a process that makes no progress. Iterations, validated documents, and bytes read or written are progress."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import platform
import resource
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sft.spec.exit_codes import EXIT_FAILED
from sft.worker import ending

_NEVER_LESS_SECONDS, _TIMES_USUAL, _PATIENT_SECONDS = 120.0, 10.0, 3600.0
_LOOK_SECONDS = 10.0
_MOVED_BYTES = 1 << 20  # fewer do not count: other threads write a line now and then


@dataclass(frozen=True, kw_only=True)
class _Phase:
    """An activity other than training iterations. It may take as long as `iterations`; if that is None, moved bytes
    count as progress.
    """

    what: str
    folder: Path | None
    iterations: float | None


class Watchdog(threading.Thread):
    """Ends this process after much longer than usual without progress. The launcher then ends the others."""

    def __init__(
        self,
        limit_seconds: float | None,
        say: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        moved: Callable[[Path | None], int] | None = None,
    ) -> None:
        """`limit_seconds` comes from the user. `moved` counts the bytes moved by this process and those in a folder."""
        super().__init__(name="watchdog", daemon=True)
        self._given, self._say, self._clock = limit_seconds, say, clock
        self._count_moved = moved or bytes_moved
        self._usual: deque[float] = deque(maxlen=20)
        self._last = clock()
        self._is_training = False
        self._phase: _Phase | None = None
        self._moved, self._looked = 0, clock()
        self._has_ended = threading.Event()

    def beat(self, *, is_iteration: bool = False) -> None:
        now = self._clock()
        if is_iteration and self._is_training:
            self._usual.append(now - self._last)
        self._is_training |= is_iteration
        self._last = now

    @contextlib.contextmanager
    def during(self, what: str, *, folder: Path | None = None, iterations: float | None = None) -> Iterator[None]:
        """Mark an activity other than an iteration: `what` it is, the `folder` it writes to, or how many iterations it
        may take.
        """
        before = self._phase
        self._moved, self._looked = self._count_moved(folder), self._clock()
        self.beat()
        self._phase = _Phase(what=what, folder=folder, iterations=iterations)
        try:
            yield
        finally:
            self._phase = before
            self.beat()

    @property
    def limit(self) -> float:
        """The time limit without progress, in seconds."""
        if not self._is_training:
            return max(self._given or 0.0, _PATIENT_SECONDS)
        usual = _TIMES_USUAL * (statistics.median(self._usual) if self._usual else 0.0)
        if self._phase is None:
            return self._given if self._given is not None else max(_NEVER_LESS_SECONDS, usual)
        if self._phase.iterations is None or not self._usual:
            return self._given if self._given is not None else _PATIENT_SECONDS
        return max(self._given if self._given is not None else _NEVER_LESS_SECONDS, usual * self._phase.iterations)

    def hang(self) -> str | None:
        """Why this process counts as hanging; None while it makes progress."""
        self._look()
        waited = self._clock() - self._last
        if waited <= self.limit:
            return None
        where = f"rank {os.environ.get('RANK', '0')} of {platform.node()}"
        while_what = f" while {self._phase.what}" if self._phase is not None else ""
        return f"no progress for {waited:.0f} s on {where}{while_what}: this process hangs, or one that it waits for"

    def end(self) -> None:
        """Stop watching: what follows has no time limit."""
        self._has_ended.set()

    def run(self) -> None:
        while not self._has_ended.wait(min(1.0, self.limit / 4)):
            reason = self.hang()
            if reason is not None and not self._has_ended.is_set():
                self._say(reason)
                _write_stack()
                ending.leave(EXIT_FAILED, reason, is_consequence=False)

    def _look(self) -> None:
        """Count bytes moved since the last look as progress, by this process or by another that writes the same
        checkpoint.
        """
        phase, now = self._phase, self._clock()
        if phase is None or now - self._looked < min(_LOOK_SECONDS, self.limit / 4):
            return
        self._looked = now
        moved = self._count_moved(phase.folder)
        if abs(moved - self._moved) >= _MOVED_BYTES:
            self._moved = moved
            self.beat()


def bytes_moved(folder: Path | None) -> int:
    """Bytes that this process has read and written so far, memory maps included, plus the size of the folder."""
    moved = resource.getrusage(resource.RUSAGE_SELF).ru_majflt * resource.getpagesize()
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/self/io").read_text().splitlines()
        moved += sum(int(line.split()[1]) for line in lines if line.startswith(("rchar:", "wchar:")))
    return moved + (_size_of(folder) if folder is not None else 0)


def _size_of(folder: Path) -> int:
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # deleted or renamed meanwhile
                size += os.stat(os.path.join(parent, name)).st_size
    return size


def _write_stack() -> None:
    file = ending.stack_file()
    if file is not None:
        with contextlib.suppress(OSError), file.open("a") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
