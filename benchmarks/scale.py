"""A hundred million documents: python benchmarks/scale.py [--write] [--documents N].

A synthetic index of so many documents, in the format of the shards, and what training needs of it in a fresh process:
seconds to open it, milliseconds to choose and pack the 64 documents of an iteration (from anywhere in the run, medians
and the longest), and the process's memory without the pages of the mapped index. Beside it, numpy's permutation, which
smaller data sets use. The shards themselves are left out: reading a document takes the same whatever their number.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.pop(0)  # this folder has a tokenize.py, and so has the standard library
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from datetime import date
from importlib import metadata
from typing import Any

import numpy as np

from tokenize_data import manifest as manifests
from tokenize_data.arrow_files import FileInfo
from tokenize_data.index import Index
from tokenize_data.manifest import FEISTEL, PERMUTATION, Manifest

_ROOT = Path(__file__).resolve().parent.parent
_RESULTS = _ROOT / "benchmarks" / "results" / "scale.md"
_AT_ONCE = 1_000_000
_GLOBAL_BATCH, _SEQ = 64, 2048
_ITERATIONS = 200


def make(folder: Path, documents: int) -> float:
    """Write the index and a manifest; seconds for both."""
    began, random = time.perf_counter(), np.random.default_rng(0)
    with closing(Index(folder)) as index:
        for first in range(0, documents, _AT_ONCE):
            count = min(_AT_ONCE, documents - first)
            lengths = random.integers(20, _SEQ, count).astype(np.uint32)
            lines = np.arange(first + 1, first + 1 + count, dtype=np.uint32)
            nothing = np.zeros(count, np.uint32)
            index.add({"length": lengths, "trained": lengths // 2, "cut": nothing, "line": lines, "source": nothing})
        info = index.write("index.arrow")
    (folder / "shard.arrow").write_bytes(b"")
    manifests.write(folder, _manifest(documents, info))
    return time.perf_counter() - began


def _manifest(documents: int, index: FileInfo) -> Manifest:
    return Manifest(
        run_name="scale",
        created="",
        documents=documents,
        tokens=0,
        trained_tokens=0,
        role_tokens={},
        rows={},
        rejected_reasons={},
        num_cut=0,
        num_with_special_text=0,
        num_open=0,
        num_double_bos=0,
        num_without_bos=0,
        seq=_SEQ,
        id_type="uint16",
        batch_documents=1024,
        tokenizer={"fingerprint": ""},
        template={"fingerprint": ""},
        datasets=[{"files": [{"name": "train.jsonl"}]}],
        shards=[FileInfo("shard.arrow", 0, "", documents)],
        index=index,
        files=[],
        versions={},
    )


def measure(folder: Path, shuffle: str) -> dict[str, Any]:
    """In this process, which must be fresh."""
    from sft.plan.packing import plan_batch
    from sft.plan.sampler import Sampler
    from tokenize_data.reader import ShardReader

    before = _anonymous_bytes()
    opening, reader = _timed(lambda: ShardReader(folder))
    indexing, lengths = _timed(lambda: reader.lengths)
    sampler = Sampler(len(reader), _GLOBAL_BATCH, 1234, shuffle=shuffle)

    def plan(number: int) -> Any:
        return plan_batch((lengths[sampler.documents(number)].astype(np.int64) - 1).tolist(), 4 * _SEQ, 4)

    first, _ = _timed(lambda: plan(0))
    last = len(reader) // _GLOBAL_BATCH - 1
    numbers = np.linspace(1, last, _ITERATIONS).astype(int).tolist()
    seconds = [_timed(lambda number=number: plan(number))[0] for number in numbers]
    return {
        "open": opening + indexing,
        "first": first,
        "median": statistics.median(seconds),
        "most": max(seconds),
        "bytes": _anonymous_bytes() - before,
    }


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def _anonymous_bytes() -> int:
    """Of this process, without pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def table(documents: int, written: float, size: int, found: dict[str, dict[str, Any]]) -> str:
    names = {FEISTEL: "computed (large data sets)", PERMUTATION: "numpy's permutation"}
    lines = [
        f"{documents:,} documents; the index has {size / 1e9:.2f} GB and was written in {written:.0f} s. Measured on",
        f"{date.today()}, {os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, "
        f"numpy {metadata.version('numpy')}, pyarrow {metadata.version('pyarrow')}.",
        "",
        "| shuffle | opened in | first iteration | median of "
        f"{_ITERATIONS} | longest | memory besides the mapped index |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        cells = [f"{one[key] * 1e3:.2f} ms" for key in ("open", "first", "median", "most")]
        lines.append(f"| {names[name]} | {' | '.join(cells)} | {one['bytes'] / 1e6:.0f} MB |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000_000)
    parser.add_argument("--write", action="store_true", help=f"write {_RESULTS.relative_to(_ROOT)}")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "SHUFFLE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure[0]), arguments.measure[1])))
        return
    with tempfile.TemporaryDirectory() as scratch:
        written = make(Path(scratch), arguments.documents)
        found = {}
        for shuffle in (FEISTEL, PERMUTATION):
            command = [sys.executable, str(Path(__file__)), "--measure", scratch, shuffle]
            done = subprocess.run(command, check=True, text=True, capture_output=True)
            found[shuffle] = json.loads(done.stdout)
        size = Path(scratch, "index.arrow").stat().st_size
    text = table(arguments.documents, written, size, found)
    print(text)
    if arguments.write:
        _RESULTS.write_text(f"# A hundred million documents\n\n`python benchmarks/scale.py --write`\n\n{text}\n")


if __name__ == "__main__":
    main()
