"""Starts a command's workers on this node, passes signals on, and turns the way they end into one line and an exit
code.

This is not torch's elastic launcher, which gives processes only 30 seconds to save after a signal, ends them in its
own order after a failure, keeps no stacks of hanging processes, and imports torch for two seconds. `torchrun -m sft`
works as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.launcher.network import interface_towards
from sft.spec.exit_codes import EXIT_FAILED, EXIT_OK, EXIT_PREEMPTED, EXIT_USER_ERROR, signal_name
from sft.spec.workers import ATTEMPT, LAUNCHER, NOTES, PASSED_ON, SHOW_STACKS, set_library_defaults

# Use huge pages for tensors and keep freed memory: otherwise page faults take a sixth of an iteration on a CPU.
ALLOCATION = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8388608:glibc.malloc.trim_threshold=268435456"
_POLL_SECONDS, _LOOK_SECONDS, _GRACE_SECONDS, _STACK_SECONDS = 0.1, 0.5, 4.0, 30.0


@dataclass(frozen=True, kw_only=True)
class NodeSlot:
    """A node's position in a run, and its number of workers."""

    per_node: int
    nodes: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int | None = None  # None: a free one
    attempt: str | None = None  # the attempt's name, known only to its nodes; None on a single node


class End:
    """Lets another thread tell `start` to end its workers, and why."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def because(self, reason: str) -> None:
        self.reason = self.reason or reason


def set_single_process_env() -> None:
    """Make this process the only one of its run."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def start(
    command: str,
    program: Sequence[str],
    place: NodeSlot,
    *,
    stacks: Path | None = None,
    threads: int | None = None,
    end: End | None = None,
    tell: Callable[[str], None] | None = None,
) -> int:
    """Run `python <program>` as workers until all have ended; after a failure the others are ended too. `tell`
    receives the reason; the default prints it to stderr as a line of `command`.
    """
    tell = tell or (lambda reason: say(command, reason))
    with tempfile.TemporaryDirectory(prefix="sft-") as scratch:
        notes = Path(scratch)
        environment = _environment(place, notes, threads)
        with _held_back():
            workers = [_start_worker(program, place, local_rank, environment) for local_rank in range(place.per_node)]
        try:
            with _passing_on(workers):
                _wait(workers, end, notes)
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
                worker.wait()
            if stacks is not None:
                _keep_stacks(notes, stacks)
        codes = [worker.returncode for worker in workers]
        if end is not None and end.reason is not None and any(codes):
            tell(f"{end.reason}: the run has ended here too; run the same command to resume from the latest checkpoint")
            return EXIT_FAILED
        code, reason = _how_they_ended(notes, codes, stacks)
        if reason:
            tell(reason)
        return code


def say(command: str, text: str) -> None:
    sys.stderr.write(f"sft {command}: {text}\n")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(place: NodeSlot, notes: Path, threads: int | None) -> dict[str, str]:
    """The environment of all workers on this node."""
    environment = {
        **os.environ,
        "WORLD_SIZE": str(place.nodes * place.per_node),
        "LOCAL_WORLD_SIZE": str(place.per_node),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(place.port or free_port()),
        NOTES: str(notes),
        LAUNCHER: str(os.getpid()),
        ATTEMPT: place.attempt or secrets.token_hex(8),
    }
    if place.nodes > 1 and (interface := interface_towards(place.address)) is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
        environment.setdefault("NCCL_SOCKET_IFNAME", interface)
    environment.setdefault("GLIBC_TUNABLES", ALLOCATION)
    set_library_defaults(environment)
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    return environment


def _start_worker(
    program: Sequence[str], place: NodeSlot, local_rank: int, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    rank = place.node * place.per_node + local_rank
    environment = {**environment, "RANK": str(rank), "LOCAL_RANK": str(local_rank)}
    # A new session: Ctrl-C reaches workers only through the launcher, and only once.
    return subprocess.Popen([sys.executable, *program], env=environment, start_new_session=True)


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Start workers with these signals blocked, so that a signal during their imports waits until `ending.Interrupt`
    listens.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _passing_on(workers: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Pass signals to the workers, which decide what to do. Only the main thread receives signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(number: int, frame: object) -> None:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                worker.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(workers: Sequence[subprocess.Popen[bytes]], end: End | None, notes: Path) -> None:
    """Wait until all have ended, or one has failed and the others had time to report why, and their stacks."""
    while any(worker.poll() is None for worker in workers):
        is_over = end is not None and end.reason is not None
        if is_over or any(worker.poll() not in (None, EXIT_OK) for worker in workers):
            deadline = time.monotonic() + _GRACE_SECONDS
            while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
            _ask_for_stacks([worker for worker in workers if worker.poll() is None], notes)
            return
        time.sleep(_POLL_SECONDS)


def _ask_for_stacks(workers: Sequence[subprocess.Popen[bytes]], notes: Path) -> None:
    """Ask workers for their stacks and wait until they are written. A worker that cannot run writes none."""
    before = seen = _bytes_of_stacks(notes)
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            worker.send_signal(signal.SIGCONT)  # a stopped process must continue to write its stack
            worker.send_signal(SHOW_STACKS)
    deadline = time.monotonic() + _STACK_SECONDS
    while time.monotonic() < deadline and any(worker.poll() is None for worker in workers):
        time.sleep(_LOOK_SECONDS)
        now = _bytes_of_stacks(notes)
        if now == seen and sum(size > before.get(name, 0) for name, size in now.items()) >= len(workers):
            return
        seen = now


def _bytes_of_stacks(notes: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in notes.glob("*.stack")}


def _keep_stacks(notes: Path, stacks: Path) -> None:
    for file in notes.glob("*.stack"):
        if file.stat().st_size:
            stacks.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, stacks / f"rank-{file.stem}.txt")


def _how_they_ended(notes: Path, codes: Sequence[int], stacks: Path | None) -> tuple[int, str]:
    """Returns (exit code, reason): the note of the worker that failed first, or how the workers ended if none left a
    note.
    """
    if not any(codes):
        return EXIT_OK, ""
    left = [json.loads(file.read_text()) for file in sorted(notes.glob("*.json"))]
    killed = sorted({-code for code in codes if code < 0 and code != -signal.SIGKILL})
    hint = f"; where each process was: {stacks}" if stacks is not None and stacks.is_dir() else ""
    if left:
        first = min(left, key=_precedence)
        dead = _killed_ranks(codes)
        if first["is_consequence"] and dead:
            return EXIT_FAILED, f"{dead}{hint}"
        has_hint = first["message"] and first["code"] == EXIT_FAILED
        return int(first["code"]), f"{first['message']}{hint if has_hint else ''}"
    names = ", ".join(map(signal_name, killed)) or f"exit codes {', '.join(map(str, codes))}"
    return (
        EXIT_FAILED,
        f"{_killed_ranks(codes) or f'the processes of this run ended without an error message ({names})'}{hint}",
    )


def _precedence(note: dict[str, Any]) -> tuple[Any, ...]:
    """Orders notes by how likely they name the cause: not a process that lost its peer, and not one that only returned
    a result, which has no message; a user error before what it led to; then the first.
    """
    order = {EXIT_USER_ERROR: 0, EXIT_FAILED: 1, EXIT_PREEMPTED: 2}
    return note["is_consequence"], not note["message"], order.get(note["code"], 1), note["time"]


def _killed_ranks(codes: Sequence[int]) -> str | None:
    """Name the ranks that a signal killed. We kill the remaining ones ourselves, but only after one has failed."""
    killed = [f"{rank} ({signal_name(-code)})" for rank, code in enumerate(codes) if code < 0]
    if not killed:
        return None
    return f"processes were killed: rank {', '.join(killed)}: out of memory, or from outside?"
