"""Kill the data stage at random moments, feed it mutated lines: never partial data, never a traceback."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys

from tests.conftest import pair
from tests.faults.points import Fault, environment
from tokenize_data import manifest
from tokenize_data.reader import ShardReader

NUM_KILLS = int(os.environ.get("NUM_KILLS", "6"))  # 50 in the long proof
NUM_MUTATIONS = int(os.environ.get("NUM_MUTATIONS", "1500"))  # 5000 in the long proof


def test_kill_at_random_moments(bench, smollm2, tmp_path):
    """Moments are files that the command opens and modules that it imports, counted in a run that is left alone."""
    data = bench.jsonl([pair(f"Is {number}?", "Yes. " * 60) for number in range(12_000)])
    command = [sys.executable, "-m", "tokenize_data", "--run_name", "r", "--data", data, "--checkpoint", smollm2]
    command = [
        str(part) for part in [*command, "--tokenized_data_dir", bench.tokenized, "--workers", "2", "--retokenize"]
    ]
    counting = Fault("count", tmp_path / "counting", "main", "count")
    subprocess.run(command, env={**os.environ, **environment(counting)}, check=True, capture_output=True)
    moments = int((counting.gate / "count").read_text())
    expected = [shard["sha256"] for shard in bench.manifest()["shards"]]
    rng = random.Random(0)
    for attempt in range(NUM_KILLS):
        if attempt % 2:
            (bench.tokenized / "r" / "manifest.json").unlink(missing_ok=True)
        fault = Fault(
            f"event:{rng.randint(moments // 2, moments * 19 // 20)}", tmp_path / f"kill{attempt}", "main", "kill"
        )
        killed = subprocess.run(
            command, env={**os.environ, **environment(fault)}, capture_output=True, text=True, check=False
        )
        assert killed.returncode == -signal.SIGKILL, (fault, killed.stderr)
        found = manifest.read(bench.tokenized / "r") if (bench.tokenized / "r").exists() else None
        if found is not None:
            ShardReader(bench.tokenized / "r", verify=True)
        outcome = bench.tokenize("--data", data)
        assert outcome.code == 0, outcome.err
        assert [shard["sha256"] for shard in bench.manifest()["shards"]] == expected
        assert len(ShardReader(bench.tokenized / "r", verify=True)) == 12_000
        named = {info.file.split("/")[0] for info in ShardReader(bench.tokenized / "r").manifest.all_files()}
        if found is None:
            assert {entry.name for entry in (bench.tokenized / "r").iterdir()} == named | {"manifest.json"}


def mutate(rng: random.Random, line: bytes) -> bytes:
    data = bytearray(line)
    for _ in range(rng.randint(0, 4)):
        at = rng.randrange(len(data) + 1)
        what = rng.randrange(7)
        if what == 0:
            data[at:at] = bytes([rng.randrange(256)])
        elif what == 1 and data:
            del data[at : at + rng.randint(1, 5)]
        elif what == 2 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif what == 3:
            data[at:at] = rng.choice(
                [b"\\u0000", b"\\ud800", b"NaN", b"{}", b"\x00", b"\xff\xfe", b"<|im_end|>", b"1e999", b"[[[["]
            )
        elif what == 4:
            data = data[:at]
        elif what == 5:
            data = data.replace(b"prompt", rng.choice([b"prmpt", b"Prompt", b""]))
        else:
            data = data.replace(b'"Yes', rng.choice([b"5", b'["Yes', b'"', b'null,"x":"']))
    return bytes(data).replace(b"\n", b" ").replace(b"\r", b" ")


def test_mutated_lines(bench):
    rng = random.Random(1)
    good = json.dumps(pair("Is it? é 日本", "Yes, " * 5), ensure_ascii=False).encode()
    lines = [mutate(rng, good) for _ in range(NUM_MUTATIONS)]
    read = sum(1 for line in lines if line.strip())
    outcome = bench.tokenize("--data", bench.write(b"\n".join(lines)), "--max_bad_rows", str(NUM_MUTATIONS))
    assert outcome.code == 0, outcome.err
    assert "Traceback" not in outcome.err
    rows = bench.manifest()["rows"]
    assert rows["read"] == read == rows["accepted"] + rows["rejected"]
    assert rows["rejected"] > 0.3 * NUM_MUTATIONS
    assert rows["accepted"] > 0.2 * NUM_MUTATIONS
    assert len((bench.tokenized / "r" / "rejected.jsonl").read_text().splitlines()) == rows["rejected"]
    assert bench.inspect("--verify").code == 0


def test_mutated_files_one_by_one(bench):
    """Without --max_bad_rows: success, or one line and exit code 2."""
    rng = random.Random(2)
    good = json.dumps(pair()).encode()
    for number in range(NUM_MUTATIONS // 60):
        data = bench.write(good + b"\n" + mutate(rng, good) + b"\n", f"{number}.jsonl")
        outcome = bench.tokenize("--data", data, run_name=f"r{number}")
        assert outcome.code in (0, 2)
        assert outcome.err.count("\n") == (1 if outcome.code else outcome.err.count("warning"))
