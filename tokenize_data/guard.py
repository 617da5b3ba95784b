"""Runs untrusted templates and tokenizers in a process that may be killed, with limits on processor time and memory.

Processor time, not a clock's: it does not depend on what else the machine does. A function in C that does not return
cannot be stopped from within, so the timer's signal ends the process, and whoever waits for the process says why.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import resource
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from tokenize_data.errors import RowError, UserError

Pipe: TypeAlias = "Connection[Any, Any]"
Result = TypeVar("Result")
_STATM = Path("/proc/self/statm")
_TEXT, _USER_ERROR, _ROW_ERROR, _NO_MEMORY, _CRASH = b"t", b"u", b"r", b"m", b"c"


class LimitError(Exception):
    """What happened to the work, as the end of a sentence."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits for one call."""

    seconds: int
    num_bytes: int  # besides what the process has already

    def text(self, what: str) -> str:
        return (
            f"took more than {self.seconds} s of processor time"
            if what == "time"
            else f"needed more than {self.num_bytes >> 20:,} MiB of memory"
        )


class Fence:
    """Applies limits to successive calls in this process."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._room: int | None = None

    def call(self, function: Callable[[Any], Result], request: Any) -> Result:
        """Call with limits. Too little memory raises MemoryError; too little time kills this process."""
        room = self._room
        if room is not None:
            with contextlib.suppress(MemoryError):  # the process may have grown since the measurement
                return self._call(function, request, room)
        self._room = _address_space()
        return self._call(function, request, self._room)

    def _call(self, function: Callable[[Any], Result], request: Any, room: int | None) -> Result:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        if room is not None:
            wanted = room + self._limits.num_bytes
            resource.setrlimit(
                resource.RLIMIT_AS, (wanted if soft == resource.RLIM_INFINITY else min(soft, wanted), hard)
            )
        signal.setitimer(signal.ITIMER_PROF, self._limits.seconds)
        try:
            return function(request)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def may_be_killed() -> None:
    """Allow timers to end this process, whatever its parent does with their signals."""
    for number in (signal.SIGPROF, signal.SIGVTALRM):
        signal.signal(number, signal.SIG_DFL)


def was_stopped_by_timer(exit_code: int | None) -> bool:
    return exit_code == -signal.SIGPROF


def is_panic(error: BaseException) -> bool:
    """Whether this is a panic of a library that is written in Rust: no Exception, but no reason to end the program
    either.
    """
    return type(error).__name__ == "PanicException"


class Child:
    """Runs a function in a child process, which is forked at once and ends with this object."""

    def __init__(self, function: Callable[[Any], str], limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        context = multiprocessing.get_context("fork")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(function, limits, there), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # Python 3.12 warns of threads: the child takes none of their locks
            try:
                self._process.start()
            except OSError as error:
                raise UserError(
                    f"no process can be started ({error.strerror}): end other programs, or raise ulimit -u"
                ) from error
        there.close()
        self._close = weakref.finalize(self, _end, self._process, self._connection, os.getpid())

    def ask(self, request: Any) -> str:
        """Call the function in the child. Raises its UserErrors here, and LimitError if it was stopped or crashed."""
        with self._lock:
            try:
                self._connection.send(request)
                reply = self._connection.recv_bytes()
            except (EOFError, OSError):
                self._process.join()
                raise LimitError(self._ending(self._process.exitcode)) from None
        kind, text = reply[:1], reply[1:].decode("utf-8", "surrogatepass")
        if kind == _TEXT:
            return text
        if kind in (_USER_ERROR, _ROW_ERROR):
            raise (RowError if kind == _ROW_ERROR else UserError)(text)
        raise LimitError(self._limits.text("memory") if kind == _NO_MEMORY else text)

    def close(self) -> None:
        self._close()

    def _ending(self, exit_code: int | None) -> str:
        if was_stopped_by_timer(exit_code):
            return self._limits.text("time")
        if exit_code == -signal.SIGABRT:  # how Rust and C++ end where an allocation fails
            return f"crashed with SIGABRT, or {self._limits.text('memory')}"
        with contextlib.suppress(ValueError):
            return f"ended its process with {signal.Signals(-(exit_code or 0)).name}"
        return f"ended its process with exit code {exit_code}"


def _end(process: BaseProcess, connection: Pipe, parent: int) -> None:
    if os.getpid() == parent:  # not in a child of ours that holds a copy
        connection.close()
        process.kill()
        process.join()


def _serve(function: Callable[[Any], str], limits: Limits, connection: Pipe) -> None:
    try:
        _settle(connection)
        fence = Fence(limits)
        while True:
            request = connection.recv()
            connection.send_bytes(_reply(function, fence, request))
    except (EOFError, OSError, KeyboardInterrupt):  # the parent is gone, so exit
        pass
    finally:
        os._exit(0)


def _reply(function: Callable[[Any], str], fence: Fence, request: Any) -> bytes:
    try:
        return _TEXT + fence.call(function, request).encode("utf-8", "surrogatepass")
    except UserError as error:
        return (_ROW_ERROR if isinstance(error, RowError) else _USER_ERROR) + str(error).encode(
            "utf-8", "surrogatepass"
        )
    except MemoryError:
        return _NO_MEMORY
    except BaseException as error:  # a panic in Rust is no Exception
        return _CRASH + f"failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})".encode(
            "utf-8", "surrogatepass"
        )


def _settle(connection: Pipe) -> None:
    """Release what belongs to the parent: files, locks, pipes, signal handlers, and objects with finalizers."""
    gc.freeze()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends this process
    may_be_killed()
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the life of this process
    kept = (connection.fileno(), sys.stdout.fileno())
    for handle in _open_files():
        if handle > 2 and handle not in kept:
            with contextlib.suppress(OSError):
                os.close(handle)


def _open_files() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        return list(range(3, 4096))


def _address_space() -> int | None:
    """The size of this process's address space; None if unknown or if the system enforces no limit."""
    try:
        return int(_STATM.read_bytes().split()[0]) * resource.getpagesize()
    except OSError:
        return None
