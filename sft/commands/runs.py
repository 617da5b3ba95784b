"""`sft runs [DIR]`: a table of all runs below a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

_SECONDS = 2.0  # between two looks of --watch


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("checkpoints"), metavar="DIR", help="default: ./checkpoints"
    )
    parser.add_argument("--json", action="store_true", help="a list of objects, for programs")
    parser.add_argument("--watch", action="store_true", help="keep the table up to date until Ctrl-C")


def run(arguments: argparse.Namespace) -> int:
    import json
    import sys

    from rich.console import Console

    from sft.observe.runs import runs_below, runs_table
    from tokenize_data.errors import UserError

    if arguments.json and arguments.watch:
        raise UserError("--watch is for people, --json for programs: give one of them")
    rows = runs_below(arguments.folder)
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 140)
    if arguments.watch:
        _watch(console, arguments.folder)
    elif rows:
        console.print(runs_table(rows))
    else:
        console.print(f"no runs below {arguments.folder}: `sft runs DIR` looks elsewhere")
    return 0


def _watch(console: object, folder: Path) -> None:
    import time

    from rich.console import Console
    from rich.live import Live

    from sft.observe.runs import runs_below, runs_table

    assert isinstance(console, Console)
    try:
        with Live(runs_table(runs_below(folder)), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(_SECONDS)
                live.update(runs_table(runs_below(folder)), refresh=True)
    except KeyboardInterrupt:
        return
