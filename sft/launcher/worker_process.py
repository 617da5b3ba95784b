"""A worker process, started by the launcher as `python -m sft.launcher.worker_process RUN_FILE`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from sft.resolve.devices import prepare_gpus
from sft.spec.exit_codes import EXIT_OK
from sft.spec.run import RunSpec
from sft.worker import ending
from tokenize_data.errors import exit_code_of

_CONNECT_SECONDS = 1800.0


def work(spec: RunSpec, store: Any = None) -> int:
    """Run this worker. `store` is the rendezvous; torch is imported late."""

    def train() -> int:
        interrupt = ending.Interrupt()
        interrupt.listen()
        prepare_gpus()
        importlib.import_module("sft.engine.start").prepare_environment()
        meeting_point = store or importlib.import_module("sft.launcher.rendezvous").connect(_CONNECT_SECONDS)
        importlib.import_module("sft.worker.train").work(spec, interrupt, meeting_point)
        return EXIT_OK

    return ending.guarded("train", train)


def main(argv: list[str]) -> int:
    return exit_code_of("sft train", lambda: work(RunSpec.read(Path(argv[0]))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
