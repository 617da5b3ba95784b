"""The remote end of `--hostfile`: if an environment variable is set, `sft train` takes signals from standard input,
because ssh does not forward them. If the input closes, the starter is gone, and the run saves and exits.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable

SIGNALS_FROM_INPUT = "SFT_SIGNALS_FROM_INPUT"


def obey_standard_input() -> None:
    """Take signals from standard input if the environment variable is set."""
    if os.environ.pop(SIGNALS_FROM_INPUT, None) is None:
        return
    words = os.fdopen(os.dup(0), "rb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)  # workers must not read it
    threading.Thread(target=_obey, args=(words,), name="signals", daemon=True).start()


def _obey(words: Iterable[bytes]) -> None:
    for word in words:
        name = word.decode("ascii", "replace").strip()
        if name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            os.kill(os.getpid(), getattr(signal, name))
    os.kill(os.getpid(), signal.SIGTERM)
