"""Small files that hold enormous rows: little memory, and one line that says which row."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.conftest import pair


def run_with(megabytes: int, bench: Any, data: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The command with so much memory to have, beyond what it maps when it has read one row."""
    script = (
        "import resource, sys; from tokenize_data import build, cli, stage; import pyarrow.parquet, zstandard; "
        "resident = int(open('/proc/self/statm').read().split()[0]) * 4096; "
        f"resource.setrlimit(resource.RLIMIT_DATA, (resident + ({megabytes} << 20),) * 2); "
        "sys.exit(cli.entry(sys.argv[1:]))"
    )
    command = [
        sys.executable,
        "-c",
        script,
        "--run_name",
        "r",
        "--tokenized_data_dir",
        bench.tokenized,
        "--checkpoint",
        bench.base,
    ]
    command += ["--data", data, "--workers", "1", *flags]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def compressed(kind: str, piece: bytes, count: int, before: bytes = b"", after: bytes = b"") -> bytes:
    if kind == "gz":
        written = io.BytesIO()
        with gzip.GzipFile(fileobj=written, mode="wb", compresslevel=1) as file:
            for part in (before, *(piece for _ in range(count)), after):
                file.write(part)
        return written.getvalue()
    packer = zstandard.ZstdCompressor().compressobj()
    return b"".join(packer.compress(part) for part in (before, *(piece for _ in range(count)), after)) + packer.flush()


ENORMOUS = {
    "a line": ("a.jsonl", b"x" * (1 << 20), b"", b"\n", "bytes long, more than 16,777,216"),
    "white space": ("a.jsonl", b" " * (1 << 20), b"", b"\n", "no row can be used|bytes long, more than 16,777,216"),
    "a JSON text": (
        "a.json",
        b"x" * (1 << 20),
        b'[{"prompt": "',
        b'"}]',
        "row 1: more than 16,777,216 characters long",
    ),
    "a JSON list of lists": (
        "a.json",
        b"[0]," * (1 << 18),
        b"[[",
        b"]]",
        "row 1: more than 16,777,216 characters long",
    ),
    "a line of lists": ("a.jsonl", b"[0]," * (1 << 18), b"[", b"]\n", "bytes long, more than 16,777,216"),
    "a quoted value": (
        "a.csv",
        b"x\n" * (1 << 19),
        b'prompt,gold\nq,"',
        b'"\n',
        "row 1: more than 16,777,216 bytes long",
    ),
    "a line of cells": ("a.csv", b"x," * (1 << 19), b"prompt,gold\n", b"\n", "row 1: more than 16,777,216 bytes long"),
    "a header": ("a.csv", b"x" * (1 << 20), b"", b"\n", "row 1: more than 16,777,216 bytes long"),
}


@pytest.mark.parametrize("packing", ["zst", "gz"])
@pytest.mark.parametrize("what", ENORMOUS)
def test_enormous_rows_in_small_files_take_little_memory(bench, what, packing):
    """Each is 300 MB when decompressed, in a file of a few kilobytes."""
    name, piece, before, after, message = ENORMOUS[what]
    data = bench.write(compressed(packing, piece, 300, before, after), f"{name}.{packing}")
    assert data.stat().st_size < 4 << 20
    done = run_with(250, bench, data)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr[-2000:]
    assert any(part in done.stderr for part in message.split("|")), done.stderr


def test_a_row_of_many_values_takes_little_memory(bench):
    """15 MB, which Python's own objects would need half a GB for."""
    good, bad = json.dumps(pair()), f'{{"prompt": [{"[0]," * 3_900_000}[0]], "gold": "a"}}'
    done = run_with(250, bench, bench.write(f"[{good},\n{bad}]", "a.json"), "--max_bad_rows", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    (rejected,) = map(json.loads, (bench.tokenized / "r" / "rejected.jsonl").read_text().splitlines())
    assert rejected["reason"] == "more than 500,000 values: a row is one flat object"


def test_a_malformed_row_of_a_json_list_costs_itself_alone(bench):
    good = json.dumps(pair())
    assert (
        bench.tokenize(
            "--data", bench.write(f'[{good}, {{"prompt": x}}, 5, {good}]', "a.json"), "--max_bad_rows", "2"
        ).code
        == 0
    )
    assert bench.manifest()["rows"] == {"read": 4, "accepted": 2, "rejected": 2, "left_out": 0}


def test_a_json_list_of_many_rows_is_read_in_pieces(bench):
    """60 MB of one list."""
    row = json.dumps(pair("q" * 1000, "a" * 23_000)).encode()
    data = bench.write(compressed("zst", row + b", ", 2500, b"[", row + b"]"), "a.json.zst")
    done = run_with(250, bench, data, "--seq", "16", "--max_bad_rows", "2501")
    assert done.returncode == 2
    assert "2,501 rows read = 0 accepted + 2,501 rejected" in done.stderr
