"""Valid run names: they become names of folders."""

from __future__ import annotations

import re

from tokenize_data.errors import UserError

_RUN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def check_run_name(run_name: str, flag: str = "run_name") -> str:
    if not _RUN_NAME.fullmatch(run_name):
        raise UserError(
            f"--{flag} {run_name!r}: use letters, digits, '.', '_' and '-' only, and no '.' at the beginning"
        )
    return run_name
