"""python -m tests.fuzz [TARGET ...] [--seconds N] [--corpus FOLDER]: fuzz each target in a process of its own. Exit
code 1 where one broke.

A longer search keeps its corpus: `--seconds 3600 --corpus ~/corpus` goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

TARGETS = ("rows", "entries", "recipes", "manifests", "shards", "meetings", "replies")
FOUND = Path(__file__).with_name("found")  # inputs that broke something once, for each target: they are tried first


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "targets", nargs="*", default=list(TARGETS), metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: all)"
    )
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together (default: 60)")
    parser.add_argument(
        "--corpus", type=Path, default=None, help="a folder that keeps what covers something new, for each target"
    )
    given = parser.parse_args(arguments)
    if unknown := set(given.targets) - set(TARGETS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    broken = [
        name for name in given.targets if not fuzz(name, max(1, given.seconds // len(given.targets)), given.corpus)
    ]
    if broken:
        sys.stderr.write(f"broken: {', '.join(broken)}\n")
    return 1 if broken else 0


def fuzz(target: str, seconds: int, corpus: Path | None = None) -> bool:
    """Whether nothing broke."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        folder = (corpus or Path(scratch)) / target
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tests.fuzz.search", target, str(seconds), str(folder)]
        return subprocess.run(command, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
