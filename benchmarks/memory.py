"""Peak memory of the stage on a large file, in one command: python benchmarks/memory.py [--gb 5].

Writes real rows, repeated, up to the size, tokenises them with two workers, and adds up the memory of the whole process
tree as it runs. Pages that processes share are counted once (PSS) where the system tells; else more than once (RSS),
which is an upper bound.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.pop(0)  # this folder has a tokenize.py, and so has the standard library
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import os
import shutil
import subprocess
import tempfile
import time

from benchmarks.real_rows import as_line, real_rows, repeated
from tests.real_parts import smollm2_tokenizer

_GOAL_MB = 1500
_SECONDS_BETWEEN_SAMPLES = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=5.0, help="size of the file (default: 5)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the file and the shards go (default: the temporary folder)"
    )
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="memory-", dir=arguments.folder))
    try:
        size = _write(scratch / "rows.jsonl", arguments.gb)
        peak, kind, seconds = _run(scratch, arguments.workers)
    finally:
        shutil.rmtree(scratch)
    holds = "holds" if peak < _GOAL_MB else "MISSED"
    print(
        f"{size / 1e9:.2f} GB, {arguments.workers} workers: peak {peak:,.0f} MB ({kind}; goal below {_GOAL_MB:,} MB: "
        f"{holds}), "
        f"{size / 1e6 / seconds:.1f} MB/s, {seconds:,.0f} s"
    )


def _write(file: Path, gigabytes: float) -> int:
    from tokenizers import Tokenizer

    rows = repeated(real_rows([Tokenizer.from_file(str(smollm2_tokenizer() / "tokenizer.json"))]))
    size = 0
    with file.open("wb") as out:
        while size < gigabytes * 1e9:
            size += out.write(as_line(next(rows)))
    return size


def _run(scratch: Path, workers: int) -> tuple[float, str, float]:
    """(peak in MB, PSS or RSS, seconds) of the stage."""
    command = [
        sys.executable,
        "-m",
        "tokenize_data",
        "--run_name",
        "memory",
        "--data",
        str(scratch / "rows.jsonl"),
        "--tokenized_data_dir",
        str(scratch / "shards"),
        "--checkpoint",
        str(smollm2_tokenizer()),
        "--workers",
        str(workers),
    ]
    environment = {**os.environ, "PYTHONPATH": sys.path[0]}
    begun = time.monotonic()
    with (scratch / "log").open("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        peak, kinds = 0.0, set()
        while process.poll() is None:
            memory = [_memory_of(child) for child in _tree(process.pid)]
            peak = max(peak, sum(kilobytes for kilobytes, _ in memory) * 1024 / 1e6)
            kinds |= {kind for kilobytes, kind in memory if kilobytes}
            time.sleep(_SECONDS_BETWEEN_SAMPLES)
        seconds = time.monotonic() - begun
        log.seek(0)
        if process.returncode:
            raise SystemExit(f"the stage failed:\n{log.read()}")
    return peak, " and ".join(sorted(kinds)), seconds


def _tree(root: int) -> list[int]:
    """The process and all that come from it."""
    found = [root]
    for process in found:
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:
                continue
    return found


def _memory_of(process: int) -> tuple[int, str]:
    for name, key in (("smaps_rollup", "Pss:"), ("status", "VmRSS:")):
        try:
            lines = Path(f"/proc/{process}/{name}").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            if line.startswith(key):
                return int(line.split()[1]), key.strip(":").replace("VmRSS", "RSS").replace("Pss", "PSS")
    return 0, ""


if __name__ == "__main__":
    main()
