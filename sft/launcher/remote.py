"""The far end of `--hostfile`: `python -m sft.launcher.remote train <flags>` is `sft train <flags>` that takes signals
from its standard input.

ssh passes no signals on. A closed input means that whoever started this is gone: then the run saves and ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable

from sft import cli


def main(argv: list[str]) -> int:
    words = os.fdopen(os.dup(0), "rb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)  # workers must not read it
    threading.Thread(target=_obey, args=(words,), name="signals", daemon=True).start()
    return cli.entry(argv)


def _obey(words: Iterable[bytes]) -> None:
    for word in words:
        name = word.decode("ascii", "replace").strip()
        if name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            os.kill(os.getpid(), getattr(signal, name))
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
