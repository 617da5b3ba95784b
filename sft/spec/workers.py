"""The contract between a launcher and its workers: environment variables and signals."""

from __future__ import annotations

import os
import signal
from collections.abc import MutableMapping
from pathlib import Path

from tokenize_data.errors import TRACEBACK

NOTES = "SFT_NOTES"  # folder in which workers leave the reason why they stopped, and their stacks
LAUNCHER = "SFT_LAUNCHER"  # its process id: workers end with it
ATTEMPT = "SFT_ATTEMPT"  # name of this attempt, known only to its processes
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the launcher passes them on; workers save and exit
SHOW_STACKS = signal.SIGUSR2


def notes_folder() -> Path | None:
    """The folder for notes; None if none of our launchers started this process."""
    folder = os.environ.get(NOTES)
    return Path(folder) if folder is not None and Path(folder).is_dir() else None


def set_library_defaults(environment: MutableMapping[str, str]) -> None:
    """Set what libraries read while they are imported, unless the user has set it."""
    # Waiting threads sleep. Spinning ones run ten times slower if another process wants the same cores.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    if TRACEBACK not in environment:  # otherwise torch prints pages of C++ frames about a lost peer
        environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def unblock_signals() -> None:
    """Unblock the signals that are blocked while a worker imports, so that none is lost."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
