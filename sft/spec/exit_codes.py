"""Exit codes of `sft`, and the translation of other programs' exit codes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Collection

EXIT_OK, EXIT_FINISHED, EXIT_USER_ERROR, EXIT_FAILED, EXIT_PREEMPTED = 0, 1, 2, 3, 75


def as_exit_code(command: str, what: str, code: int, known: Collection[int]) -> int:
    """Translate the exit code of a program that we started. A code that is not `known` is reported as a crash."""
    if code in known:
        return code
    how = (
        f"was killed ({signal_name(-code)}): out of memory, or from outside?"
        if code < 0
        else f"crashed (exit code {code})"
    )
    sys.stderr.write(f"sft {command}: {what} {how}\n")
    return EXIT_FAILED


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no name
        return f"signal {number}"
