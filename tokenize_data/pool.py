"""Several processes that each convert a chunk at a time; results come back in order. A dead worker is an error, never a
missing chunk.

Templates and tokenizers that do not come to an end are stopped by timers of processor time: the template's own (see
`rendering`), and here one for each chunk, which is a hundred times what the slowest tokenizer takes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeAlias, TypeVar

from tokenize_data import guard
from tokenize_data.errors import FailedError, UserError

LOCAL, RAY = ENGINES = ("local", "ray")
Pipe: TypeAlias = "Connection[Any, Any]"
SECONDS_FOR_A_TASK = 600  # of CPU time
MOST_AHEAD = 8  # results a worker that wait for an earlier one
Task = TypeVar("Task")
Result = TypeVar("Result")


def ordered_map(work: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Map over worker processes, in order. Even a single worker is a process, because it may be killed. Workers are
    forked, so `work` need not be picklable.
    """
    context = multiprocessing.get_context("fork")
    ours: list[Pipe] = []
    processes = []
    for _ in range(workers):
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(work, there, [*ours, here]), daemon=True)
        process.start()
        there.close()
        ours.append(here)
        processes.append(process)
    try:
        yield from _dispatch(tasks, dict(zip(ours, processes, strict=True)))
    finally:
        for connection in ours:
            connection.close()
        for process in processes:
            process.terminate()
            process.join()


def _dispatch(tasks: Iterable[Any], workers: dict[Pipe, BaseProcess]) -> Iterator[Any]:
    """A worker that takes long over one task does not let the others pile up results: at most this many are kept."""
    waiting, idle = iter(tasks), deque(workers)
    busy: dict[Pipe, int] = {}
    finished: dict[int, Any] = {}
    due = sent = 0

    def feed() -> None:
        nonlocal sent
        while idle and sent < due + MOST_AHEAD * len(workers):
            try:
                task = next(waiting)
            except StopIteration:
                return
            connection = idle.popleft()
            busy[connection], sent = sent, sent + 1
            connection.send(task)

    feed()
    while busy:
        for connection in wait(list(busy)):
            assert isinstance(connection, Connection)
            number = busy.pop(connection)
            finished[number] = _result(connection, workers[connection])
            idle.append(connection)
            feed()
        while due in finished:
            yield finished.pop(due)
            due += 1
        feed()


def _result(connection: Pipe, process: BaseProcess) -> Any:
    try:
        result = connection.recv()
    except (EOFError, ConnectionError) as error:
        process.join()
        raise _why_it_died(process.exitcode) from error
    if isinstance(result, BaseException):
        raise result
    return result


def _why_it_died(exit_code: int | None) -> UserError:
    if guard.was_stopped_by_timer(exit_code):
        return UserError("the template did not finish on one of the rows, and was stopped: use another --template")
    if exit_code == -signal.SIGVTALRM:
        return UserError(
            f"the tokenizer took more than {SECONDS_FOR_A_TASK} s of processor time for a part of a file: use "
            "another base model"
        )
    how = f" ({signal.Signals(-exit_code).name})" if exit_code is not None and -exit_code in set(signal.Signals) else ""
    return FailedError(f"a worker process was killed{how}, probably because memory ran out: use fewer --workers")


def _close_other_sockets(ours: int) -> None:
    """Close inherited connections: the parent would not notice their end while a worker holds them."""
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if int(name) != ours and stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                    os.close(int(name))


def _serve(work: Callable[[Any], Any], connection: Pipe, inherited: list[Pipe]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and closes our pipe
    guard.may_be_killed()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hide output of panics; errors go through the pipe
    for other in inherited:
        other.close()
    _close_other_sockets(connection.fileno())
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone, so exit
        while True:
            task = connection.recv()
            try:
                signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS_FOR_A_TASK)
                result = work(task)
            except BaseException as error:
                result = error
            connection.send(result)
