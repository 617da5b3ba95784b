"""Several processes that each convert a chunk at a time; results come back in order. A dead worker is an error, never a missing chunk."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeAlias, TypeVar

from tokenize_data.errors import UserError

Pipe: TypeAlias = "Connection[Any, Any]"
Task = TypeVar("Task")
Result = TypeVar("Result")


def ordered_map(work: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """`map` over processes. With one worker, in this process. Workers are forked, so `work` need not be pickled."""
    if workers <= 1:
        yield from map(work, tasks)
        return
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
        yield from _dispatch(tasks, ours)
    finally:
        for connection in ours:
            connection.close()
        for process in processes:
            process.terminate()
            process.join()


def _dispatch(tasks: Iterable[Any], connections: list[Pipe]) -> Iterator[Any]:
    waiting = iter(enumerate(tasks))
    busy: dict[Pipe, int] = {}
    finished: dict[int, Any] = {}
    due = 0

    def feed(connection: Pipe) -> None:
        if (following := next(waiting, None)) is not None:
            busy[connection] = following[0]
            connection.send(following[1])

    for connection in connections:
        feed(connection)
    while busy:
        ready = wait(list(busy))
        for connection in (c for c in list(busy) if c in ready):
            number = busy.pop(connection)
            try:
                result = connection.recv()
            except (EOFError, ConnectionError) as error:
                raise UserError("a worker process was killed, most likely for want of memory: use fewer --workers") from error
            if isinstance(result, BaseException):
                raise result
            finished[number] = result
            feed(connection)
        while due in finished:
            yield finished.pop(due)
            due += 1


def _serve(work: Callable[[Any], Any], connection: Pipe, inherited: list[Pipe]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which closes our pipe
    for other in inherited:
        other.close()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone: so are we
        while True:
            task = connection.recv()
            try:
                result = work(task)
            except BaseException as error:
                result = error
            connection.send(result)
