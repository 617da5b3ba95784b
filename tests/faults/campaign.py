"""Every fault that a run has to survive, in one table: python -m tests.faults.campaign [--small] [--only WORD ...]
[--root DIR].

Exit code 0 only where everything survived. More than an hour on two cores; `--small` has fewer tries, as CI runs them.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults import boundaries, damages, disks, hostile, kills, layouts, phases, starts
from tests.faults.rows import Field, Row

ROWS: dict[str, Callable[[Field], Row]] = {
    "boundaries": boundaries.kill_at_boundaries,
    "ranks": kills.kill_ranks,
    "launchers": kills.kill_launchers,
    "damages": damages.damaged_files,
    "layouts": lambda field: _layouts(field),
    "limits": disks.limited_files,
    "disks": disks.tiny_disks,
    "stops": kills.stop_ranks,
    "leases": starts.leases_at_once,
    "starts": starts.starts_at_once,
    "clock-leases": starts.jumping_leases,
    "clock-files": damages.jumping_files,
    "hostile": hostile.hostile_inputs,
    "secrets": hostile.secrets,
    **phases.ROWS,
}
# Twenty starts of the whole command; what test_runs.py tries already; phases that take a start of the command for each
# try.
NOT_SMALL = (
    "starts",
    "stops",
    "phases-full",
    "phases-pauses",
    "phases-readonly",
    "phases-memory",
    "phases-killed",
    "phases-clock",
    "swapped-ranks",
)
_WRONG_SHOWN, _WIDTH = 5, 400


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.campaign", description=__doc__)
    parser.add_argument("--small", action="store_true", help="fewer tries")
    parser.add_argument(
        "--only", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)}"
    )
    parser.add_argument(
        "--root", type=Path, default=None, help="a folder for the runs (default: one that is removed afterwards)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time (default: 2)")
    given = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors, many processes
    names = [name for name in given.only if not (given.small and name in NOT_SMALL)]
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        field = Field((given.root or Path(scratch)).resolve(), small=given.small)
        with ThreadPoolExecutor(given.jobs) as pool:
            rows = list(pool.map(lambda name: one_row(name, field), names))
        matrix = field.root / "layouts.txt"
        sys.stdout.write(table(rows) + (f"\n{matrix.read_text()}" if matrix.exists() else ""))
    return 0 if all(row.is_good for row in rows) else 1


def one_row(name: str, field: Field) -> Row:
    """A row that breaks is one that did not survive."""
    began = time.monotonic()
    try:
        row = ROWS[name](field)
    except Exception:
        row = Row(name, wrong=[f"the row itself broke: {traceback.format_exc()}"])
    sys.stderr.write(
        f"{row.fault}: {row.survived} of {row.tries} in {time.monotonic() - began:.0f} s\n"
        + "".join(f"  {w}\n" for w in row.wrong)
    )
    return row


def table(rows: Sequence[Row]) -> str:
    width = max(len(row.fault) for row in rows)
    lines = [
        f"{'fault':<{width}} | {'tries':>5} | {'survived':>8} | {'lost iterations':>15} | ",
        f"{'-' * width}-|------:|---------:|----------------:|-",
    ]
    for row in rows:
        lines.append(f"{row.fault:<{width}} | {row.tries:>5} | {row.survived:>8} | {row.lost:>15} | {row.note}")
    for row in rows:
        lines += [f"WRONG {row.fault}: {' '.join(wrong.split())[-_WIDTH:]}" for wrong in row.wrong[:_WRONG_SHOWN]]
    return "\n".join(lines) + "\n"


def _layouts(field: Field) -> Row:
    row, differences = layouts.resumed_layouts(field)
    title = "largest relative difference of a loss, layouts as tp pp dp, resumed from (rows) on (columns)"
    (field.root / "layouts.txt").write_text("\n".join([title, *layouts.lines_of(differences)]) + "\n")
    return row


if __name__ == "__main__":
    sys.exit(main())
