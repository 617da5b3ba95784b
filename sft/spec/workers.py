"""The contract between a launcher and its workers: environment variables and signals."""

from __future__ import annotations

import os
import signal
from pathlib import Path

NOTES = "SFT_NOTES"  # a folder in which workers leave why they stopped, and their stacks
LAUNCHER = "SFT_LAUNCHER"  # its process number: workers end with it
ATTEMPT = "SFT_ATTEMPT"  # a name of this attempt that only its processes know
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the launcher passes them on; workers save and leave
SHOW_STACKS = signal.SIGUSR2


def notes_folder() -> Path | None:
    """None where no launcher of ours has started this process."""
    folder = os.environ.get(NOTES)
    return Path(folder) if folder is not None and Path(folder).is_dir() else None


def unblock_signals() -> None:
    """Workers start with these signals blocked, so that none is lost while they import."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
