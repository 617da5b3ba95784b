"""Start-up, loading and growth: python benchmarks/growth.py [--write].

startup: seconds of `sft -h`, and of `sft train` with SmolLM2-135M from the command to the end of its first iteration,
in two parts: up to the beginning of that iteration (imports, checks, loading), and the iteration. The data are
tokenised and the base is converted before. loading: a random Llama in float32 is loaded from its files, against a plain
read of them, from the page cache; MB/s, medians. documents: CPU seconds for each token while tokenising, and for each
trained token of the same iterations' worth of training, with 10 and 100 times the documents.
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
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from typing import Any

from benchmarks.contestants import cpu_seconds
from sft.launcher.processes import ALLOCATION
from tests.demo import make_rows
from tests.real_parts import smollm2

_ROOT = Path(__file__).resolve().parent.parent
_RESULTS = _ROOT / "benchmarks" / "results" / "growth.md"
_PACKAGES = ("torch", "deepspeed", "transformers", "safetensors")
_DOCUMENTS = (640, 6_400, 64_000)
_ITERATIONS = 40


def run(arguments: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(_ROOT), "PYTHONWARNINGS": "ignore", "GLIBC_TUNABLES": ALLOCATION}
    return subprocess.run(
        [sys.executable, "-m", *arguments], check=True, text=True, env=environment, capture_output=True, **options
    )


def write_rows(file: Path, count: int) -> None:
    file.write_text(
        "".join(
            json.dumps(row | {"prompt": f"Case {n}: {row['prompt']}"}) + "\n"
            for n, row in enumerate(make_rows(count, 1))
        )
    )


def startup(work: Path) -> list[str]:
    from sft.model.base_folder import resolve

    base = str(resolve(str(smollm2())))
    write_rows(work / "train.jsonl", 64)
    flags = ["--checkpoint", base, "--run_name", "start", "--tokenized_data_dir", str(work / "tokenized")]
    run(["tokenize_data", *flags, "--data", str(work / "train.jsonl")])
    helps, begins, ends = [], [], []
    for number in range(4):
        began = time.perf_counter()
        run(["sft", "-h"])
        helps.append(time.perf_counter() - began)
        since = time.time()
        run(
            [
                "sft",
                "train",
                *flags,
                "--save_checkpoint_dir",
                str(work / f"runs{number}"),
                "--global_batch",
                "8",
                "--iters",
                "1",
            ]
        )
        (metrics,) = (work / f"runs{number}").glob("*/metrics.jsonl")
        record = json.loads(metrics.read_text().splitlines()[0])
        ends.append(metrics.stat().st_mtime - since)  # it is written once
        begins.append(ends[-1] - record["seconds"])
    rows = [("`sft -h`", helps, 0.5), ("command to the beginning of the first iteration", begins[1:], None)]
    rows.append(("command to the end of the first iteration", ends[1:], 12))
    lines = ["| start-up | seconds | goal |", "|---|---|---|"]
    return [*lines, *(f"| {name} | {statistics.median(found):.2f} | {goal or ''} |" for name, found, goal in rows)]


def loading(work: Path) -> list[str]:
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from sft.model.build import build_stage
    from sft.model.collectives import SingleRank
    from sft.model.weight_names import match_names
    from sft.model.weights import WeightFiles, load

    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=16,
        vocab_size=32000,
        architectures=["LlamaForCausalLM"],
    )
    built = build_stage(
        config,
        range(8),
        SingleRank(),
        sequence_parallel=False,
        recompute="none",
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    file = work / "model.safetensors"
    save_file({name: torch.randn(parameter.shape) for name, parameter in built.parameters.items()}, file)
    megabytes = file.stat().st_size / 1e6
    plain, ours, memory = [], [], memoryview(bytearray(file.stat().st_size))  # as much memory as the parameters take
    for _ in range(7):
        began = time.perf_counter()
        with file.open("rb", buffering=0) as opened:
            done = 0
            while count := opened.readinto(memory[done : done + 64 * 2**20]):
                done += count
        plain.append(time.perf_counter() - began)
        began = time.perf_counter()
        files = WeightFiles(work)
        expected = {name: place.shape for name, place in built.all_places.items()}
        names = match_names(
            expected,
            files,
            base_prefix=built.base_prefix,
            tied={},
            ignore=built.ignored,
            grown={},
            renames=built.renames,
        )
        load({name: (parameter, built.places[name].part) for name, parameter in built.parameters.items()}, files, names)
        ours.append(time.perf_counter() - began)
    file.unlink()
    rates = [megabytes / statistics.median(found) for found in (plain, ours)]
    return [
        "| loading, page cache | MB/s | of a plain read | goal |",
        "|---|---|---|---|",
        f"| a plain read | {rates[0]:,.0f} | 1 | |",
        f"| into the model's parameters | {rates[1]:,.0f} | {rates[1] / rates[0]:.2f} | 0.8 |",
    ]


def documents(work: Path) -> list[str]:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from sft.model.base_folder import resolve

    folder = work / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(resolve(str(smollm2())))
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lines, first = (
        [
            (
                "| documents | tokenising with its start, CPU s a million tokens | training, CPU s a million "
                "trained tokens | of the first |"
            )
        ],
        None,
    )
    lines.append("|---|---|---|---|")
    for count in _DOCUMENTS:
        name = f"grow{count}"
        write_rows(work / "rows.jsonl", count)
        flags = [
            "--checkpoint",
            str(folder),
            "--run_name",
            name,
            "--tokenized_data_dir",
            str(work / "tokenized"),
            "--seq",
            "256",
        ]
        began = cpu_seconds()
        run(["tokenize_data", *flags, "--data", str(work / "rows.jsonl"), "--workers", "1"])
        made = cpu_seconds() - began
        manifest = json.loads((work / "tokenized" / name / "manifest.json").read_text())
        began = cpu_seconds()
        train = ["sft", "train", *flags, "--save_checkpoint_dir", str(work / "runs")]
        run([*train, "--iters", "1", "--id", "one"])
        start = cpu_seconds() - began
        began = cpu_seconds()
        run([*train, "--iters", str(1 + _ITERATIONS), "--id", "all"])
        taken = cpu_seconds() - began - start
        (metrics,) = (work / "runs").glob(f"*{name}*all/metrics.jsonl")
        trained = sum(
            json.loads(line)["trained_tokens"]
            for line in metrics.read_text().splitlines()[1:]
            if "trained_tokens" in line
        )
        each = taken / trained * 1e6
        first = first or each
        lines.append(f"| {count:,} | {made / manifest['tokens'] * 1e6:.2f} | {each:.1f} | {each / first:.3f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["startup", "loading", "documents"])
    parser.add_argument("--write", action="store_true", help=f"write {_RESULTS.name}")
    arguments = parser.parse_args()
    lines = ["# Start-up, loading and growth", ""]
    for part in arguments.parts:
        with tempfile.TemporaryDirectory() as work:
            lines += [*{"startup": startup, "loading": loading, "documents": documents}[part](Path(work)), ""]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)
    lines.append(
        f"{date.today()}: Python {platform.python_version()}, {versions}; {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}."
    )
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.write:
        _RESULTS.write_text(text)


if __name__ == "__main__":
    main()
