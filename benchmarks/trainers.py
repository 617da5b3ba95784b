"""Who trains in benchmarks/train_cpu.py, each in a process of its own: the same documents, seconds of each iteration,
losses.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft.config.settings import Settings
    from sft.engine.pipeline import Pipeline
    from sft.launcher.rendezvous import connect

RATE, RANK = 1e-4, 16
OURS = "sft"
BARE = "sft's stage in a bare loop"
ALL_PEERS = ("TRL, defaults", "TRL, batches of 1", "HF Trainer, groups of like length")
# pip install --no-deps litgpt lightning lightning-utilities torchmetrics jsonargparse docstring-parser
LITGPT = "litgpt, batches of 1"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


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


class Worker:
    """What a worker of `sft` has before it trains, in this process alone."""

    def __init__(self, settings: Settings) -> None:
        from sft.checkpoint.stage import load_stage, read_base
        from sft.engine.feed import Feed
        from sft.engine.groups import form_groups
        from sft.engine.start import start_worker
        from sft.launcher.processes import set_single_process_env
        from sft.objective.cross_entropy import CrossEntropy
        from sft.resolve.run import resolve

        self.job = resolve(settings, world=1)
        set_single_process_env()
        self._device = start_worker(connect(600))
        self._processes, self.loaded = form_groups(self.job.layout), read_base(self.job)
        self.built, _ = load_stage(self.job, self.loaded, self._processes, self._device)
        self.feed = Feed(
            self.job.data.open(), capacity=self.job.capacity, replicas=1, replica=0, objective=CrossEntropy()
        )

    def pipeline(self) -> Pipeline:

        from sft.engine.pipeline import Pipeline
        from sft.objective.cross_entropy import CrossEntropy

        return Pipeline(
            self.built,
            self._processes,
            optimizer=self.job.settings.optimizer.spec(RATE),
            objective=CrossEntropy(),
            tokens_at_once=self.job.tokens_at_once,
            clip=1.0,
            device=self._device,
            vocabulary_size=self.loaded.config.vocab_size,
        )


def ours(
    workload: Workload, base: Path, work: Path, iterations: int, threads: int, *, engine: bool = True
) -> tuple[list[tuple[float, float]], list[float]]:
    """As a worker does it; or, without the engine, its stage in a loop, which shows what the engine costs."""
    import torch

    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from sft.config.settings import Settings
    from sft.engine.trainer import train

    config = Settings.of(
        run_name=workload.data,
        checkpoint=str(base),
        tokenized_data_dir=str(work / "tokenized"),
        seq=workload.seq,
        seed=0,
        global_batch=workload.documents,
        iters=iterations,
        dtype=workload.dtype,
        weight_decay=0.0,
        eps=1e-8,
        lora=RANK if workload.lora else None,
    )
    worker = Worker(config)
    job, feed = worker.job, worker.feed
    if not engine:
        return _bare_loop(worker.built.stage, feed, job.sampler, worker.loaded.config.vocab_size, iterations)
    pipeline = worker.pipeline()
    clock, losses = Clock(), []
    for record in train(
        pipeline, feed, job.sampler, job.data.open(), rate=lambda _: RATE, start=0, iterations=iterations
    ):
        clock.lap()
        losses.append(record["loss"])
    return clock.taken, losses


def _bare_loop(
    stage: Any, feed: Any, sampler: Any, vocabulary_size: int, iterations: int
) -> tuple[list[Any], list[float]]:
    import torch

    from sft.engine.loss import MicroBatchLoss
    from sft.model.collectives import SingleRank
    from sft.objective.cross_entropy import CrossEntropy
    from sft.plan.chunks import tokens_at_once

    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)
    at_once = tokens_at_once(vocabulary_size, is_gpu=False)
    loss, losses = MicroBatchLoss(CrossEntropy(), stage, vocabulary_size, SingleRank(), at_once), []
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
    from tokenize_data.manifest import dataset_folder
    from tokenize_data.reader import ShardReader
    from tokenize_data.rendered import ASSISTANT

    reader = ShardReader(dataset_folder(work / "tokenized", workload.data))
    sampler = Sampler(len(reader), workload.documents, 0)
    made = []
    for number in (int(number) for iteration in range(iterations) for number in sampler.documents(iteration)):
        ids, roles = reader[number].ids.tolist(), reader[number].roles().tolist()
        labels = [token if role == ASSISTANT else -100 for token, role in zip(ids, roles, strict=True)]
        made.append({"input_ids": ids, "labels": labels})
    return made


def trl(
    workload: Workload, base: Path, work: Path, iterations: int, threads: int, *, best: bool
) -> tuple[list[Any], list[float]]:
    """Its defaults, but for the dtype; or, best, whatever makes it faster without another loss: no padding, nothing
    recomputed.
    """
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(threads)
    size = 1 if best else 8
    changed: dict[str, Any] = {"gradient_checkpointing": False} if best else {}
    clock, losses, callback = _hooks()
    options = SFTConfig(
        output_dir=str(work / "trl"),
        max_steps=iterations,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=workload.documents // size,
        max_length=workload.seq,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        logging_steps=1,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **changed,
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, DTYPES[workload.dtype])),
        args=options,
        train_dataset=datasets.Dataset.from_list(documents(workload, work, iterations)),
        processing_class=tokenizer,
        callbacks=[callback],
        peft_config=_peft() if workload.lora else None,
    )
    trainer.train()
    return clock.taken, losses


def hf_trainer(
    workload: Workload, base: Path, work: Path, iterations: int, threads: int
) -> tuple[list[Any], list[float]]:
    """Batches of 8 documents of like length, padded to the longest of each. Documents of an iteration are the same, in
    another order.
    """
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    torch.set_num_threads(threads)
    clock, losses, callback = _hooks()
    made, count = documents(workload, work, iterations), workload.documents
    parts = [sorted(made[at : at + count], key=lambda one: len(one["input_ids"])) for at in range(0, len(made), count)]
    options = TrainingArguments(
        output_dir=str(work / "hf"),
        max_steps=iterations,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=count // 8,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        logging_steps=1,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, DTYPES[workload.dtype])),
        args=options,
        train_dataset=datasets.Dataset.from_list([one for part in parts for one in part]),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[callback],
    )
    trainer.train()
    return clock.taken, losses


def litgpt(workload: Workload, base: Path, work: Path, iterations: int, threads: int) -> tuple[list[Any], list[float]]:
    """Its model and its loss in the loop of its full fine-tuning, whose batches are of one document unless one asks for
    more.
    """
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    made, count, losses = documents(workload, work, iterations), workload.documents, []
    clock = Clock()
    for at in range(0, len(made), count):
        trained, total = sum(label >= 0 for one in made[at : at + count] for label in one["labels"][1:]), 0.0
        for one in made[at : at + count]:
            ids, labels = torch.tensor([one["input_ids"]]), torch.tensor([one["labels"]])
            loss = chunked_cross_entropy(model(ids)[..., :-1, :], labels[..., 1:])
            loss = (
                loss * int((labels[..., 1:] >= 0).sum()) / trained
            )  # each token weighs the same, as it does for the others
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

    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")


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
        BARE: lambda *arguments: ours(*arguments, engine=False),
        "TRL, defaults": lambda *arguments: trl(*arguments, best=False),
        "TRL, batches of 1": lambda *arguments: trl(*arguments, best=True),
        "HF Trainer, groups of like length": hf_trainer,
        LITGPT: litgpt,
    }
    here = [name for name in workload.peers if name != LITGPT or importlib.util.find_spec("litgpt") is not None]
    return {name: every[name] for name in (OURS, *here)}
