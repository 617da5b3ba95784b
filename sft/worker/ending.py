"""How a worker ends: with one line and an exit code. On a signal it saves first."""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import json
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO

from sft.spec.errors import TrainingError
from sft.spec.exit_codes import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER_ERROR
from sft.spec.workers import LAUNCHER, NOTES, PASSED_ON, SHOW_STACKS, notes_folder, unblock_signals
from sft.worker.peers import is_lost_peer
from tokenize_data.errors import TRACEBACK, FailedError, UserError

_SAME_SIGNAL_SECONDS = 3.0


class PreemptedError(Exception):
    """The run was stopped by a signal, after saving."""


class Interrupt:
    """Records that a signal or an error asked this process to save and exit. A second signal exits at once."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.error: Exception | None = None
        self._signalled_at = 0.0

    def listen(self) -> None:
        for number in PASSED_ON:
            signal.signal(number, self._on_signal)
        unblock_signals()

    def because(self, error: Exception) -> None:
        """Make all processes save and exit because of an error that only this one has."""
        self.error = self.error or error

    @property
    def is_asked(self) -> bool:
        return self.name is not None or self.error is not None

    def _on_signal(self, number: int, frame: object) -> None:
        if self.name is not None and time.monotonic() - self._signalled_at < _SAME_SIGNAL_SECONDS:
            return  # queues and launchers may deliver the same signal more than once
        if self.name is not None:
            leave(
                EXIT_FAILED,
                f"stopped at once by a second signal ({signal.Signals(number).name}); the newest checkpoint is kept",
            )
        self.name, self._signalled_at = signal.Signals(number).name, time.monotonic()
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(
                f"sft: {self.name}: saving after this iteration, then stopping; send it again to stop at once\n"
            )


def guarded(command: str, work: Callable[[], int]) -> int:
    """Run `work` in a worker. If it fails, leave one line for the launcher, or print it where there is none."""
    _end_with_launcher()
    if command != "train":  # training saves before it exits
        unblock_signals()
    stack = _register_stack()
    try:
        code = work()
        if code and notes_folder() is not None:
            _leave_note(code, "", is_consequence=False)  # a result, such as a comparison that failed, which work() said
        if int(os.environ["WORLD_SIZE"]) > 1 and (NOTES in os.environ or os.environ["RANK"] != "0"):
            _end(code)  # nothing is left to do, except in torchrun's first worker, which still holds the lease
        return code
    except Exception as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        code = _code_of(error)
        if int(os.environ["WORLD_SIZE"]) > 1:
            leave(code, reason_of(error), is_consequence=is_lost_peer(error))
        _leave_note(code, reason_of(error), is_lost_peer(error))
        return code
    finally:
        if stack is not None:
            faulthandler.unregister(SHOW_STACKS)
            stack.close()


def leave(code: int, message: str, *, is_consequence: bool = False) -> None:
    """Exit at once: other threads may hang in a collective with processes that are gone."""
    _leave_note(code, message, is_consequence)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end(code: int) -> None:
    """Exit as Python does, but without unloading libraries: gloo can abort a finished process (torch 2.13)."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def reason_of(error: BaseException) -> str:
    """Describe in one line why a run stopped."""
    if isinstance(error, UserError | PreemptedError | TrainingError):
        return " ".join(str(error).splitlines())
    torch = sys.modules.get("torch")  # without torch there is no GPU memory to run out of
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory: use a smaller --micro_batch, --recompute full, or a larger --tp or --pp"
    where = f"{platform.node()}, process {os.getpid()}, rank {os.environ.get('RANK', '0')}"
    return f"{type(error).__name__} ({where}): {' '.join(str(error).split())[:500]}; {TRACEBACK}=1 shows where"


def _code_of(error: Exception) -> int:
    if isinstance(error, PreemptedError):
        return EXIT_PREEMPTED
    is_given = isinstance(error, UserError) and not isinstance(error, FailedError)
    return EXIT_USER_ERROR if is_given else EXIT_FAILED


def _leave_note(code: int, message: str, is_consequence: bool) -> None:
    folder = notes_folder()
    if folder is None:
        sys.stderr.write(f"sft {sys.argv[1] if len(sys.argv) > 1 and sys.argv[1].isalpha() else 'train'}: {message}\n")
        return
    note = {"code": code, "message": message, "is_consequence": is_consequence, "time": time.time()}
    file = folder / f"{os.environ['RANK']}.json"
    scratch = file.with_suffix(".part")
    scratch.write_text(json.dumps(note))
    scratch.rename(file)


def _end_with_launcher() -> None:
    """Die with the launcher: a worker has its own session and would keep running."""
    if NOTES not in os.environ or sys.platform != "linux":
        return
    set_parent_death_signal = 1  # prctl's PR_SET_PDEATHSIG
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(os.environ.get(LAUNCHER, os.getppid())):  # the launcher died before prctl took effect
        os.kill(os.getpid(), signal.SIGKILL)


def stack_file() -> Path | None:
    """The file in which this process leaves its stacks for the launcher; None without one of our launchers."""
    folder = notes_folder()
    return None if folder is None else folder / f"{int(os.environ['RANK']):05d}.stack"


def _register_stack() -> IO[str] | None:
    """Write the stacks of all threads when the launcher's signal arrives, whatever this process is waiting for."""
    file = stack_file()
    if file is None:
        return None
    stream = file.open("w")
    faulthandler.register(SHOW_STACKS, file=stream, all_threads=True)
    return stream
