"""Every layout resumed on every other: a table from -> to of the largest relative difference of a loss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.distributed.resume_worker import SAVED_AFTER
from tests.faults.rows import Field, Row

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = ("111", "211", "121", "112", "411", "141", "114", "221", "212", "122")  # tp, pp, dp
SMALL = ("111", "112")
LIMIT, HANG_SECONDS = 1e-6, 3600  # the second against processes that never end
_FAMILY = {"family": "llama1"}  # as many heads for keys as for queries: tp may be 4

Table = dict[tuple[str, str], float]


def resumed_layouts(field: Field) -> tuple[Row, Table]:
    """Writers and readers, one torchrun for each number of processes; a reader waits for its writer."""
    row, layouts, folder = Row("resume on another layout"), SMALL if field.small else LAYOUTS, field.folder("layouts")
    with ThreadPoolExecutor(3) as pool:
        ends = list(
            pool.map(
                lambda world: _torchrun(folder, world, layouts),
                sorted({_world(layout) for layout in layouts}, reverse=True),
            )
        )
    row.wrong += [end for end in ends if end]
    table: Table = {}
    for writer in layouts:
        for reader in layouts:
            file = folder / f"{writer}-as-{reader}-0.json"
            if not file.exists():
                row.count(f"{writer} -> {reader}", "did not resume")
                continue
            theirs = json.loads((folder / f"{writer}-0.json").read_text())["losses"][SAVED_AFTER:]
            ours = json.loads(file.read_text())["losses"]
            difference = max(abs(one[0] - other[0]) / abs(other[0]) for one, other in zip(ours, theirs, strict=True))
            table[writer, reader] = difference
            limit = 0.0 if writer == reader else LIMIT
            row.count(f"{writer} -> {reader}", None if difference <= limit else f"losses differ by {difference:.1e}")
    row.note = f"largest difference of a loss {max(table.values(), default=0):.1e}"
    return row, table


def lines_of(table: Table) -> list[str]:
    """The table as text: rows wrote, columns resumed."""
    layouts = list(dict.fromkeys(writer for writer, _ in table))
    head = "from \\ to  " + "  ".join(f"{layout:>7}" for layout in layouts)
    return [
        head,
        *(
            f"{one:<9}  " + "  ".join(f"{table.get((one, other), float('nan')):7.1e}" for other in layouts)
            for one in layouts
        ),
    ]


def _world(layout: str) -> int:
    tp, pp, dp = map(int, layout)
    return tp * pp * dp


def _case(name: str, layout: str, **options: Any) -> dict[str, Any]:
    tp, pp, dp = map(int, layout)
    return {"name": name, "tp": tp, "pp": pp, "dp": dp, **_FAMILY, **options}


def _torchrun(folder: Path, world: int, layouts: tuple[str, ...]) -> str | None:
    """What went wrong."""
    mine = [layout for layout in layouts if _world(layout) == world]
    cases = [_case(layout, layout) for layout in mine]
    cases += [_case(f"{writer}-as-{reader}", reader, resume=writer) for reader in mine for writer in layouts]
    file = folder / f"cases-{world}.json"
    file.write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += ["-m", "tests.distributed.resume_worker", str(file), str(folder)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS, check=False, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        return f"{world} processes did not end within {HANG_SECONDS} s"
    return f"{world} processes: exit code {done.returncode}: {done.stderr[-600:]}" if done.returncode else None
