"""The whole command, killed and stopped from outside: one of its ranks, its launcher, at any moment from its start
on.
"""

from __future__ import annotations

import os
import random
import re
import signal
from typing import Any

from tests.faults.points import Fault, environment, wait_for
from tests.faults.rows import (
    RUN,
    SEED,
    TWO,
    WHOLE,
    Field,
    Row,
    curve,
    finish,
    is_alive,
    left_behind,
    newest_step,
    run,
    start,
    workers_of,
)
from tests.faults.waiting import until

ITERATIONS_A_LIFE, EARLY_SHARE = 5, 0.2
EARLY_EVENTS = 3000  # files that a worker opens, and modules that it imports, before it trains: more than these
NO_HANG = ["--hang_timeout", 3600]  # for processes that are held


def kill_ranks(field: Field, tries: int = 12) -> Row:
    return _killed(field, "rank", "SIGKILL of one rank", 1 if field.small else tries)


def kill_launchers(field: Field, tries: int = 12) -> Row:
    return _killed(field, "launcher", "SIGKILL of the launcher", 1 if field.small else tries)


def stop_ranks(field: Field) -> Row:
    """SIGSTOP: the run ends with exit code 3, one line, and every rank's stack."""
    row = Row("SIGSTOP of one rank")
    for rank in (1,) if field.small else (0, 1):
        name = f"stopped{rank}"
        fault = Fault("iteration:3", field.folder(f"gates/{name}"), f"rank {rank}", "stop")
        process = start(field.site, "--id", name, "--iters", 4000, *TWO, "--hang_timeout", 8, env=environment(fault))
        wait_for(fault, process)
        ranks = workers_of(process.pid)
        code, _, errors = finish(process)
        stacks = field.site.root / "checkpoints" / f"{RUN}-{name}" / "stacks"
        texts = [file.read_text() for file in sorted(stacks.glob("rank-*.txt"))]
        wrong = None
        if code != 3 or "no progress for " not in errors or errors.count("\n") != 1:
            wrong = f"exit code {code}: {errors[-300:]}"
        elif len(texts) != 2 or not all("most recent call first" in text for text in texts):
            wrong = f"{len(texts)} stacks"
        elif any(is_alive(pid) for pid in ranks):
            wrong = "a rank is alive"
        row.count(f"rank {rank}", wrong)
    return row


def _killed(field: Field, name: str, fault: str, tries: int) -> Row:
    """One run that is killed again and again, and in the end has the metrics of one that was not."""
    row, rng, site = Row(fault), random.Random(f"{SEED} {name}"), field.site
    iterations = WHOLE if field.small else tries * ITERATIONS_A_LIFE + WHOLE
    folder = site.root / "checkpoints" / f"{RUN}-{name}"
    flags = ["--id", name, "--iters", iterations, *TWO]
    for number in range(1, tries + 1):
        begin = newest_step(folder)
        moment = _moment(field, name, number, begin, rng)
        process = start(site, *flags, *NO_HANG, env=environment(moment))
        is_there = wait_for(moment, process)
        before, ranks = newest_step(folder), workers_of(process.pid)
        if is_there:
            os.kill(process.pid if name == "launcher" else moment.pids()[0], signal.SIGKILL)
        # one that is held so early that it does not end with its launcher goes on until it sees that it is alone
        moment.open()
        wrong = _ended(process, ranks, name) if is_there else f"it did not come to {moment.point}"
        said, errors = process.communicate()
        after = newest_step(folder)
        lost = max(0, before - after)
        if begin and "resumed after iteration " in said and _resumed_after(said) != begin:
            lost += max(0, begin - _resumed_after(said))
            wrong = wrong or f"resumed after {_resumed_after(said)}, the last commit was {begin}"
        row.count(f"kill {number} of {moment.who} at {moment.point}", wrong and f"{wrong}: {errors[-300:]}", lost)
    committed = newest_step(folder)
    code, said, errors = run(site, *flags)
    whole, _ = field.whole(iterations)
    if code or (committed and _resumed_after(said) != committed):
        row.wrong.append(
            f"the last start ended with {code}, resumed after {_resumed_after(said)} of {committed}: {errors[-300:]}"
        )
    elif curve(site.metrics(f"{RUN}-{name}")) != curve(whole):
        row.wrong.append("its losses, rates and gradient norms are not those of a run that was not killed")
    if left := left_behind(folder):
        row.wrong.append(f"left behind: {left}")
    return row


def _moment(field: Field, name: str, number: int, begin: int, rng: random.Random) -> Fault:
    """Mostly while it trains or saves, sometimes before it has begun to. The process is held there until it is
    killed.
    """
    rank, gate = f"rank {rng.choice((0, 1))}", field.folder(f"gates/{name}-{number}")
    if rng.random() < EARLY_SHARE and not field.small:
        return Fault(f"event:{rng.randrange(1, EARLY_EVENTS)}", gate, rank)
    at = begin + rng.randint(2 if begin else 4, ITERATIONS_A_LIFE)
    if field.small:
        return Fault(f"iteration:{at}", gate, rank)
    point = rng.choice(("iteration", "iteration", "iteration", "snapshot", "write", "manifest"))
    numbers = {"iteration": at, "snapshot": 2, "write": rng.choice((1, 2)), "manifest": 1}
    return Fault(f"{point}:{numbers[point]}", gate, "rank 0" if point == "manifest" else rank)


def _ended(process: Any, ranks: list[int], name: str) -> str | None:
    """What is wrong with the end of a run of which a process was killed."""
    if not until(lambda: process.poll() is not None and not any(map(is_alive, ranks))):
        process.kill()
        return "processes outlived it"
    if name == "rank" and process.returncode != 3:
        return f"exit code {process.returncode}"
    return None


def _resumed_after(said: str) -> int:
    found = re.search(r"resumed after iteration ([\d,]+)", said)
    return int(found[1].replace(",", "")) if found else 0
