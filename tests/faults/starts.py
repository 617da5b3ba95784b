"""Many starts at once in one folder, and leases under a clock that jumps: one trains, the others are told who does."""

from __future__ import annotations

import json
import os
import platform
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from sft.job import lease
from tests.faults.rows import SEED, Field, Row, finish, forks, start
from tokenize_data.errors import UserError

STARTS, HOLD_SECONDS, WATCH_SECONDS = 20, 3.0, 0.3
REFUSED = re.compile(r"is being trained by process \d+ on \S+, its lease is \d+ s old: wait for it")
NO_PROCESS = 2**22 + 1


def contend(folder: str, number: int, barrier: Any, answers: Any) -> None:
    """Take the lease and keep it; every step of it takes a while, so that others come in between."""
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
            time.sleep(HOLD_SECONDS)
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
            barrier, answers = context.Barrier(STARTS), context.Queue()
            rivals = [context.Process(target=contend, args=(str(folder), n, barrier, answers)) for n in range(STARTS)]
            for rival in rivals:
                rival.start()
            told = [answers.get(timeout=60)[1] for _ in rivals]
            for rival in rivals:
                rival.join()
            row.count(f"{before} {number}", _not_one(told) or (f"left: {os.listdir(folder)}" if (folder / lease.NAME).exists() else None))
    return row


def starts_at_once(field: Field) -> Row:
    """The whole command."""
    row = Row(f"{STARTS} starts at once: the command")
    processes = [start(field.site, "--id", "crowd", "--iters", 5, "--nproc_per_node", 1) for _ in range(STARTS)]
    ends = [finish(process, 400) for process in processes]
    told = ["holds" if code == 0 else errors for code, _, errors in ends]
    finished = sum(code == 1 and "this run is finished" in errors for code, _, errors in ends)  # began after the first had ended
    wrong = _not_one([text for text in told if "this run is finished" not in text])
    records = field.site.metrics("llama-base-orders-seq256-crowd")
    if wrong is None and [record["iteration"] for record in records] != [1, 2, 3, 4, 5]:
        wrong = f"metrics of iterations {[record['iteration'] for record in records]}"
    row.tries, row.survived, row.note = STARTS, STARTS if wrong is None else 0, f"{finished} came too late" if finished else ""
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
    content = {"host": host or platform.node(), "boot": boot, "pid": pid, "started": started, "renewed": time.time() - age, "token": "t"}
    file.write_text(json.dumps(content))
    os.utime(file, (time.time() - age, time.time() - age))
    return file


def jumping_leases(field: Field) -> Row:
    """A living holder keeps its lease and a dead one loses it, whatever the clocks say, within seconds."""
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
    with _renewed(file, jump) if is_alive and not is_here else mock.patch.object(lease, "RENEW_SECONDS", 10.0):
        try:
            with lease.held(folder, watch_seconds=2.0):
                return "a living one lost it" if is_alive else None
        except UserError as error:
            return None if is_alive else f"refused: {error}"


@contextmanager
def _renewed(file: Path, jump: float) -> Iterator[None]:
    """By a holder on another host, whose clock differs."""
    stop = threading.Event()

    def renew() -> None:
        content = json.loads(file.read_text())
        while not stop.wait(0.3):
            scratch = file.with_name(f"{lease.NAME}.elsewhere")
            scratch.write_text(json.dumps({**content, "renewed": time.time() + jump}))
            os.utime(scratch, (time.time() + jump, time.time() + jump))
            os.replace(scratch, file)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
