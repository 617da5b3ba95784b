"""Many starts at once in one folder, and leases under a clock that jumps: one trains, the others are told who does."""

from __future__ import annotations

import json
import os
import platform
import random
import re
import time
from pathlib import Path
from typing import Any
from unittest import mock

from sft.launcher import lease
from tests.faults.points import Fault, environment
from tests.faults.rows import SEED, Field, Row, finish, forks, start
from tests.faults.waiting import HANG_SECONDS, until
from tokenize_data.errors import UserError

STARTS, WATCH_SECONDS = 20, 0.3
REFUSED = re.compile(r"is being trained by process \d+ on \S+, its lease is \d+ s old: wait for it")
NO_PROCESS = 2**22 + 1


def contend(folder: str, number: int, barrier: Any, answers: Any, all_answered: Any) -> None:
    """Take the lease and keep it until everyone has answered; every step of it takes a while, so that others come in
    between.
    """
    rng = random.Random(f"{SEED} {number}")

    def slowly(step: Any) -> Any:
        def slow(*arguments: Any, **options: Any) -> Any:
            time.sleep(rng.uniform(0, 0.05))
            return step(*arguments, **options)

        return slow

    for name in ("rename", "link", "unlink"):
        mock.patch.object(os, name, slowly(getattr(os, name))).start()
    barrier.wait()
    try:
        with lease.held(Path(folder), watch_seconds=WATCH_SECONDS):
            answers.put((number, "holds"))
            all_answered.wait()
    except UserError as error:
        answers.put((number, str(error)))
    except BaseException as error:
        answers.put((number, repr(error)))


def leases_at_once(field: Field) -> Row:
    """Where there was no lease, one of a dead process, and one that is not whole."""
    row, context = Row(f"{STARTS} starts at once: the lease"), forks()
    for number in range(1 if field.small else 5):
        for before in ("none", "dead", "torn"):
            folder = field.folder(f"leases-{before}-{number}")
            if before == "dead":
                write_lease(folder, pid=NO_PROCESS)
            elif before == "torn":
                (folder / lease.NAME).touch()
            barrier, answers, all_answered = context.Barrier(STARTS), context.Queue(), context.Event()
            rivals = [
                context.Process(target=contend, args=(str(folder), n, barrier, answers, all_answered))
                for n in range(STARTS)
            ]
            for rival in rivals:
                rival.start()
            try:
                told = [answers.get(timeout=HANG_SECONDS)[1] for _ in rivals]
            finally:
                all_answered.set()
            for rival in rivals:
                rival.join()
            row.count(
                f"{before} {number}",
                _not_one(told) or (f"left: {os.listdir(folder)}" if (folder / lease.NAME).exists() else None),
            )
    return row


def starts_at_once(field: Field) -> Row:
    """The whole command. The one that trains is held until the others have ended."""
    row = Row(f"{STARTS} starts at once: the command")
    fault = Fault("iteration:1", field.folder("gates/crowd"), "rank *")
    flags = ["--id", "crowd", "--iters", 5, "--nproc_per_node", 1, "--hang_timeout", 3600]
    processes = [start(field.site, *flags, env=environment(fault)) for _ in range(STARTS)]
    until(lambda: sum(process.poll() is not None for process in processes) >= STARTS - 1)
    fault.open()
    ends = [finish(process) for process in processes]
    wrong = _not_one(["holds" if code == 0 else errors for code, _, errors in ends])
    records = field.site.metrics("llama-base-orders-seq256-crowd")
    if wrong is None and [record["iteration"] for record in records] != [1, 2, 3, 4, 5]:
        wrong = f"metrics of iterations {[record['iteration'] for record in records]}"
    row.tries, row.survived = STARTS, STARTS if wrong is None else 0
    row.wrong += [wrong] if wrong else []
    return row


def _not_one(told: list[str]) -> str | None:
    holders = told.count("holds")
    odd = [text for text in told if text != "holds" and not REFUSED.search(text)]
    if holders != 1:
        return f"{holders} trained"
    return f"refused with {odd[0][-300:]!r}" if odd else None


def write_lease(folder: Path, *, pid: int, age: float = 0, host: str | None = None, started: str | None = "1") -> Path:
    file = folder / lease.NAME
    boot = lease._boot() if host is None else "another"
    content = {
        "host": host or platform.node(),
        "boot": boot,
        "pid": pid,
        "started": started,
        "renewed": time.time() - age,
        "token": "t",
    }
    file.write_text(json.dumps(content))
    os.utime(file, (time.time() - age, time.time() - age))
    return file


def jumping_leases(field: Field) -> Row:
    """A living holder keeps its lease and a dead one loses it, whatever the clocks say."""
    row = Row("clock that jumps: leases")
    for jump in (-1e8, -3600, 0, 3600, 1e8):
        for holder in ("dead here", "alive here", "dead elsewhere", "alive elsewhere"):
            folder = field.folder(f"clock-{holder.replace(' ', '-')}-{jump:.0f}")
            row.count(f"{holder}, clock {jump:+.0f} s", _outcome_is_wrong(folder, holder, jump))
    return row


def _outcome_is_wrong(folder: Path, holder: str, jump: float) -> str | None:
    """The lease was written by a clock that differs from ours by `jump`."""
    is_here, is_alive = holder.endswith(" here"), holder.startswith("alive")
    if not is_here and not is_alive and abs(jump) < 60:
        return None  # fresh, and nobody can know yet
    started = lease._start_of(os.getpid()) if is_here and is_alive else "1"
    pid = os.getpid() if is_here and is_alive else NO_PROCESS
    file = write_lease(folder, pid=pid, age=-jump, host=None if is_here else "elsewhere", started=started)
    with mock.patch.object(lease, "time", _Clock(file, jump if is_alive and not is_here else None)):
        try:
            with lease.held(folder, watch_seconds=25.0):
                return "a living one lost it" if is_alive else None
        except UserError as error:
            return None if is_alive else f"refused: {error}"


class _Clock:
    """Time as the lease sees it: it passes where someone waits. Every ten seconds a holder on another host renews, by
    its own clock.
    """

    def __init__(self, file: Path, jump: float | None) -> None:
        self._file, self._jump, self._passed, self._renewed = file, jump, 0.0, 0.0

    def time(self) -> float:
        return time.time() + self._passed

    def monotonic(self) -> float:
        return self._passed

    def sleep(self, seconds: float) -> None:
        self._passed += seconds
        if self._jump is not None and self._passed - self._renewed >= lease.RENEW_SECONDS:
            self._renewed, there = self._passed, self.time() + self._jump
            scratch = self._file.with_name(f"{lease.NAME}.elsewhere")
            scratch.write_text(json.dumps({**json.loads(self._file.read_text()), "renewed": there}))
            os.utime(scratch, (there, there))
            os.replace(scratch, self._file)
