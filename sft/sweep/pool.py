"""Runs several trials at once, each on its own GPUs. Signals are passed to all of them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.resolve.devices import visible_gpus
from tokenize_data.errors import UserError
from tokenize_data.files import append_private

_POLL_SECONDS = 0.1
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A named command; its output is appended to `log`."""

    name: str
    command: Sequence[str]
    log: Path


@dataclass
class _Running:
    task: Task
    process: subprocess.Popen[bytes]
    began: float


class Pool:
    """Runs tasks until none are left or a signal arrives. `slots` are the environment variables of each parallel
    task.
    """

    def __init__(self, slots: Sequence[Mapping[str, str]]) -> None:
        self._free = list(slots)
        self._running: dict[int, tuple[_Running, Mapping[str, str]]] = {}
        self.signal: str | None = None

    def run(self, next_task: Callable[[], Task | None], ended: Callable[[Task, int, float], None]) -> None:
        """`next_task` returns the next task, None if there is none now; `ended` receives exit code and seconds."""
        before = {number: signal.signal(number, self._on_signal) for number in _PASSED_ON}
        try:
            while True:
                while self._free and self.signal is None and (task := next_task()) is not None:
                    self._start(task)
                if not self._running:
                    return
                time.sleep(_POLL_SECONDS)
                self._collect(ended)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for running, _ in self._running.values():
                running.process.kill()
                running.process.wait()

    def _start(self, task: Task) -> None:
        slot = self._free.pop(0)
        with append_private(task.log) as log:
            process = subprocess.Popen(
                task.command,
                env={**os.environ, **slot},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        self._running[process.pid] = (_Running(task, process, time.monotonic()), slot)

    def _collect(self, ended: Callable[[Task, int, float], None]) -> None:
        for pid, (running, slot) in list(self._running.items()):
            code = running.process.poll()
            if code is not None:
                del self._running[pid]
                self._free.append(slot)
                ended(running.task, code, time.monotonic() - running.began)

    def _on_signal(self, number: int, frame: object) -> None:
        self.signal = signal.Signals(number).name
        for running, _ in self._running.values():
            running.process.send_signal(number)


def make_slots(parallel: int) -> list[dict[str, str]]:
    """Divide the GPUs, or without GPUs the cores, equally among `parallel` trials."""
    if parallel == 1:
        return [{}]
    count = visible_gpus()
    if count:
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = (
            [name.strip() for name in listed.split(",")][:count] if listed else [str(number) for number in range(count)]
        )
        if parallel > count:
            raise UserError(
                f"--parallel {parallel} with {count} visible GPUs: at most {count}, as each trial has GPUs of its own"
            )
        each = count // parallel
        return [{"CUDA_VISIBLE_DEVICES": ",".join(names[slot * each : (slot + 1) * each])} for slot in range(parallel)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // parallel))
    return [{"OMP_NUM_THREADS": threads} for _ in range(parallel)]


def _end_with_parent() -> None:
    """Make trials save and exit when the sweep is killed."""
    libc: Any = ctypes.CDLL(None)
    set_parent_death_signal = 1  # prctl's PR_SET_PDEATHSIG
    libc.prctl(set_parent_death_signal, signal.SIGTERM)
