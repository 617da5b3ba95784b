"""The whole command, killed and stopped from outside: one of its ranks, its launcher, at any moment from its start on."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from typing import Any

from tests.faults.rows import (
    RUN,
    SEED,
    TWO,
    WHOLE,
    Field,
    Row,
    finish,
    is_alive,
    iterations_done,
    newest_step,
    run,
    start,
    until,
    workers_of,
)  # fmt: skip

ITERATIONS_A_LIFE, END_SECONDS, EARLY_SHARE = 5, 10, 0.2
SMALL = 80  # so many that a run does not end by itself before it is found to have begun
Kill = Callable[[int, random.Random], None]


def kill_ranks(field: Field, tries: int = 12) -> Row:
    return _killed(field, "rank", "SIGKILL of one rank", _one_rank, 1 if field.small else tries)


def kill_launchers(field: Field, tries: int = 12) -> Row:
    return _killed(field, "launcher", "SIGKILL of the launcher", lambda pid, _: os.kill(pid, signal.SIGKILL), 1 if field.small else tries)


def stop_ranks(field: Field) -> Row:
    """SIGSTOP: the run ends with exit code 3, one line, and every rank's stack."""
    row = Row("SIGSTOP of one rank")
    for rank in (1,) if field.small else (0, 1):
        name = f"stopped{rank}"
        process = start(field.site, "--id", name, "--iters", 4000, *TWO, "--hang_timeout", 4)
        until(lambda: iterations_done(field.site, name) >= 2 or process.poll() is not None, 90)  # noqa: B023
        ranks = workers_of(process.pid)
        if len(ranks) == 2:
            os.kill(ranks[rank], signal.SIGSTOP)
        code, _, errors = finish(process, 60)
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


def _one_rank(launcher: int, rng: random.Random) -> None:
    if until(lambda: bool(workers_of(launcher)), END_SECONDS) and (ranks := workers_of(launcher)):
        os.kill(rng.choice(ranks), signal.SIGKILL)  # else there is none to kill, which the end tells


def _killed(field: Field, name: str, fault: str, kill: Kill, tries: int) -> Row:
    """One run that is killed again and again, and in the end has the metrics of one that was not."""
    row, rng, site = Row(fault), random.Random(f"{SEED} {name}"), field.site
    iterations = SMALL if field.small else tries * ITERATIONS_A_LIFE + WHOLE
    folder = site.root / "checkpoints" / f"{RUN}-{name}"
    flags = ["--id", name, "--iters", iterations, *TWO]
    for number in range(1, tries + 1):
        begin = newest_step(folder)
        process = start(site, *flags)
        _wait_for_a_moment(field, process, name, begin, rng)
        before = newest_step(folder)
        ranks = workers_of(process.pid)
        is_early = process.poll() is not None
        if not is_early:
            kill(process.pid, rng)
        wrong = "it had ended by itself" if is_early else _ended(process, ranks, name)
        said, errors = process.communicate()
        after = newest_step(folder)
        lost = max(0, before - after)
        if begin and "resumed after iteration " in said and _resumed_after(said) != begin:
            lost += max(0, begin - _resumed_after(said))
            wrong = wrong or f"resumed after {_resumed_after(said)}, the last commit was {begin}"
        row.count(f"kill {number} after iteration {iterations_done(site, name)}", wrong and f"{wrong}: {errors[-300:]}", lost)
    committed = newest_step(folder)
    code, said, errors = run(site, *flags)
    whole, _ = field.whole(iterations)
    if code or (committed and _resumed_after(said) != committed):
        row.wrong.append(f"the last start ended with {code}, resumed after {_resumed_after(said)} of {committed}: {errors[-300:]}")
    elif _curve(site.metrics(f"{RUN}-{name}")) != _curve(whole):
        row.wrong.append("its losses, rates and gradient norms are not those of a run that was not killed")
    left = [path.name for path in folder.iterdir() if path.name.startswith((".writing", ".removing", ".latest", ".lease", ".hf"))]
    if left:
        row.wrong.append(f"left behind: {left}")
    return row


def _wait_for_a_moment(field: Field, process: Any, name: str, begin: int, rng: random.Random) -> None:
    """Mostly while it trains, sometimes before it has begun to."""
    if rng.random() < EARLY_SHARE and not field.small:
        until(lambda: bool(workers_of(process.pid)) or process.poll() is not None, 60)
        time.sleep(rng.uniform(0, 4))
        return
    done = begin + rng.randint(2 if begin else 4, ITERATIONS_A_LIFE)
    file = field.site.root / "checkpoints" / f"{RUN}-{name}" / "metrics.jsonl"
    before = file.stat().st_mtime_ns if file.exists() else 0  # it still has what the life before did after its last save
    until(lambda: (file.exists() and file.stat().st_mtime_ns != before) or process.poll() is not None, 120)
    until(lambda: iterations_done(field.site, name) >= done or process.poll() is not None, 120)
    time.sleep(rng.uniform(0, 0.1))


def _ended(process: Any, ranks: list[int], name: str) -> str | None:
    """What is wrong with the end of a run of which a process was killed."""
    began = time.monotonic()
    if not until(lambda: process.poll() is not None and not any(map(is_alive, ranks)), END_SECONDS):
        process.kill()
        return f"processes outlived it by {END_SECONDS} s"
    if name == "rank" and ranks and process.returncode != 3:
        return f"exit code {process.returncode} after {time.monotonic() - began:.0f} s"
    return None


def _resumed_after(said: str) -> int:
    found = re.search(r"resumed after iteration ([\d,]+)", said)
    return int(found[1].replace(",", "")) if found else 0


def _curve(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(record["iteration"], record["loss"], record["lr"], record["grad_norm"]) for record in records]
