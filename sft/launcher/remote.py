"""The far end of `--hostfile`: with an environment variable, `sft train` takes signals from its standard input.

ssh passes no signals on. A closed input means that whoever started this is gone: then the run saves and ends.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable

SIGNALS_FROM_INPUT = "SFT_SIGNALS_FROM_INPUT"


def obey_standard_input() -> None:
    """Where the environment asks for it."""
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
