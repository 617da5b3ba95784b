"""`sft doctor`: what is installed, what this machine has, and whether a tiny training step works."""

from __future__ import annotations

import argparse
from pathlib import Path

_MOST_SECONDS = 300
_ROW = '{"prompt": "Is it?", "gold": "Yes."}\n'


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one object, for programs")
    parser.add_argument(
        "--folder", type=Path, default=Path(), metavar="DIR", help="where runs would be written (default: here)"
    )


def run(arguments: argparse.Namespace) -> int:
    import json
    import time
    from dataclasses import asdict

    from rich.console import Console

    from sft.resolve.health import Finding, findings
    from sft.spec.exit_codes import EXIT_FAILED, EXIT_OK

    console = Console(highlight=False, markup=False, soft_wrap=True)
    found = findings(arguments.folder)
    if not arguments.json:
        for finding in found:
            _show(console, finding)
    began = time.monotonic()
    reason = try_training()
    seconds = round(time.monotonic() - began, 1)
    text = f"a tiny model was trained for one iteration in {seconds} s" if reason is None else f"fails: {reason}"
    found.append(Finding(topic="training", text=text, level="ok" if reason is None else "problem"))
    if arguments.json:
        print(json.dumps({"training_works": reason is None, "findings": [asdict(one) for one in found]}, indent=2))
    else:
        _show(console, found[-1])
    return EXIT_OK if reason is None else EXIT_FAILED


def try_training() -> str | None:
    """Train a tiny random model for one iteration in a child process. Returns the reason of a failure in one line, or
    None.
    """
    import os
    import subprocess
    import sys
    import tempfile

    from sft.verify.tiny import write_tiny_base

    with tempfile.TemporaryDirectory(prefix="sft-doctor-") as scratch:
        write_tiny_base(Path(scratch, "base"))
        Path(scratch, "rows.jsonl").write_text(_ROW * 4)
        flags = "--checkpoint base --run_name doctor --data rows.jsonl --iters 1 --global_batch 4 --micro_batch 1"
        flags += " --seq 64 --nproc_per_node 1 --no_tensorboard"
        inherited = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "sft", "train", *flags.split()],
                cwd=scratch,
                env=inherited | {"PYTHONPATH": _search_path()},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_MOST_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return f"not finished after {_MOST_SECONDS} s"
        if done.returncode == 0:
            return None
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if line.startswith("sft train:")), lines[-1] if lines else "")
        return f"{said.removeprefix('sft train: ') or 'no output'} (exit code {done.returncode})"


_OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def _search_path() -> str:
    """Put the folder of our packages first, so that the child runs this code from any working directory."""
    import os

    import tokenize_data  # beside `sft`

    assert tokenize_data.__file__ is not None
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(Path(tokenize_data.__file__).parents[1]), *([before] if before else [])])


def _show(console: object, finding: object) -> None:
    from rich.console import Console

    from sft.resolve.health import Finding

    assert isinstance(console, Console)
    assert isinstance(finding, Finding)
    mark, style = {"ok": ("ok", "green"), "note": ("note", "yellow"), "problem": ("!!", "red")}[finding.level]
    console.print(f"{mark:<5} {finding.topic:<20} {finding.text}", style=style)
