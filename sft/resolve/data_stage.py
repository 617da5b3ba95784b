"""Runs the data stage: `tokenize_data` in a separate process, with the run's settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sft.config.settings import Settings
from sft.families.experts import check_no_experts
from sft.resolve.base import tokenizer_flags
from sft.resolve.devices import check_torch, visible_gpus
from sft.spec.base import BaseModel
from sft.spec.exit_codes import EXIT_FAILED, EXIT_OK, EXIT_USER_ERROR, as_exit_code
from tokenize_data.errors import ERROR_FILE
from tokenize_data.flags import flags_of
from tokenize_data.recipe import dataset_values
from tokenize_data.recipe_file import escaped

_LISTS = ("datasets", "val_datasets")


def tokenise(settings: Settings, base: BaseModel, error_file: Path | None = None) -> int:
    """Tokenise, and return the exit code. An unsupported base is rejected first. Errors are printed, or written to
    `error_file`.
    """
    check_torch(visible_gpus())
    check_no_experts(base.config)
    command = [sys.executable, "-m", "tokenize_data", *flags_of(settings.data), *tokenizer_flags(settings, base)]
    if not (settings.data.datasets or settings.data.val_datasets):
        return run_program(command, error_file)
    with tempfile.TemporaryDirectory(prefix="sft-") as scratch:  # only the lists: everything else has a flag
        file = Path(scratch, "datasets.yaml")
        lists = {name: [dataset_values(spec) for spec in settings.value(name)] for name in _LISTS}
        file.write_text(json.dumps(escaped(lists)))
        return run_program([*command, "--config", str(file)], error_file)


def run_program(command: Sequence[str], error_file: Path | None = None) -> int:
    environment = os.environ if error_file is None else {**os.environ, ERROR_FILE: str(error_file)}
    code = subprocess.run(command, env=environment).returncode
    known = (EXIT_OK, EXIT_USER_ERROR, EXIT_FAILED)
    return as_exit_code("train", "the data stage (tokenize_data)", code, known)
