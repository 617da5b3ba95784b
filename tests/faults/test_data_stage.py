"""Kill the data stage at random moments, feed it mutated lines: never partial data, never a traceback."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

from tests.conftest import pair
from tokenize_data import manifest
from tokenize_data.reader import ShardReader

NUM_KILLS = int(os.environ.get("NUM_KILLS", "6"))  # 50 in the long proof
NUM_MUTATIONS = int(os.environ.get("NUM_MUTATIONS", "1500"))  # 5000 in the long proof


def test_kill_at_random_moments(bench, smollm2):
    data = bench.jsonl([pair(f"Is {number}?", "Yes. " * 60) for number in range(12_000)])
    command = [sys.executable, "-m", "tokenize_data", "--run_name", "r", "--data", data, "--checkpoint", smollm2]
    command = [str(part) for part in [*command, "--tokenized_data_dir", bench.tokenized, "--workers", "2"]]
    begun = time.monotonic()
    subprocess.run([*command, "--retokenize"], check=True, capture_output=True)
    whole = time.monotonic() - begun
    expected = [shard["sha256"] for shard in bench.manifest()["shards"]]
    rng = random.Random(0)
    killed = 0
    for attempt in range(NUM_KILLS):
        if attempt % 2:
            (bench.tokenized / "r" / "manifest.json").unlink(missing_ok=True)
        process = subprocess.Popen([*command, "--retokenize"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.2, 1.0) * whole)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
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
    assert killed >= NUM_KILLS // 3  # some are finished before their moment comes


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
            data[at:at] = rng.choice([b"\\u0000", b"\\ud800", b"NaN", b"{}", b"\x00", b"\xff\xfe", b"<|im_end|>", b"1e999", b"[[[["])
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
