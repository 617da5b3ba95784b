"""Makes a plan from settings, model, data and machine. Needs no torch and starts no processes."""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sft.config.settings import Settings
from sft.plan.answer import Data, Plan
from sft.plan.gpus import GB, TABLE, Gpu, find_gpu, read_gpus
from sft.plan.layout import Layout
from sft.plan.rows import Batches
from sft.plan.sampler import Sampler, num_iterations
from sft.plan.schedule import in_words
from sft.plan.search import RECOMPUTES, Choice, Question, best, layout_of, search
from sft.resolve.base import Described, describe_base_model
from sft.resolve.devices import local_gpu, visible_gpus
from sft.resolve.mixing import sampler_of
from sft.resolve.question import Pack, RunFacts, global_batch_of, recompute_of
from sft.resolve.speed import cpu_operations_per_second
from sft.spec.base import BaseModel
from tokenize_data.bases import known_documents
from tokenize_data.errors import UserError
from tokenize_data.manifest import dataset_folder
from tokenize_data.reader import ShardReader

_SAMPLED_ITERATIONS = 5
_BYTES_PER_TOKEN = 4.0  # bytes per token of English JSONL, roughly
_CPU_OPERATIONS = 5e10  # operations per second, if they are not measured
_GPU_ROW_TOKENS = 8192  # a row long enough to keep a GPU busy
_COUNTED_BYTES = 2**30  # bytes in which rows are counted; the rest is estimated by size


def machine(settings: Settings) -> Gpu | None:
    """The GPU that --gpu names, or this machine's; None without either."""
    table = read_gpus(Path(settings.layout.gpu_file)) if settings.layout.gpu_file else TABLE
    if settings.layout.gpu:
        return find_gpu(settings.layout.gpu, table)
    return local_gpu(table) if visible_gpus() else None


def this_cpu(processes: int, operations_per_second: float = _CPU_OPERATIONS) -> Gpu:
    """This CPU as a GPU: each process has its share of memory and cores."""
    memory = _memory_bytes() / GB / processes
    rate = operations_per_second / processes / 1e12
    return Gpu(
        name="cpu",
        memory_gb=round(memory, 1),
        bf16_tflops=rate,
        fp32_tflops=rate,
        memory_gbps=10.0 / processes,
        link_gbps=2.0,
        network_gbps=1.0,
        gpus_per_node=max(processes, 1),
        matrix_efficiency=1.0,
        reserved_gb=min(1.0, memory / 4),
        spare=0.0,
        communicator_gb=0.0,
    )


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def make_plan(settings: Settings) -> Plan:
    """Plan a run whose data need not be tokenised and whose base need not be here."""
    base, notes = describe_base_model(settings), []
    gpu = machine(settings)
    world = settings.machine.nodes * (settings.machine.nproc_per_node or max(visible_gpus(), 1))
    if gpu is None:
        if visible_gpus():
            notes.append("this GPU is not in the table: describe it with --gpu_file, or name a similar one with --gpu")
        gpu = this_cpu(settings.machine.nproc_per_node or 1, cpu_operations_per_second())
        notes.append("planned for this computer's CPU: name GPUs with --gpu h100-80gb --nproc_per_node 8 --nodes 2")
    data, pack, share = _data(settings, notes)
    asked = RunFacts(settings=settings, base=base, world=world, gpu=gpu, pack=pack, trained_share=share).question()
    question = asked.question
    choice, found = best(question), search(question)
    notes += [line for line in (_layout_note(asked.note, choice.layout), _batch_note(settings, choice.layout)) if line]
    notes += _further_notes(settings, base, question, choice)
    iterations = settings.schedule.iters or (
        num_iterations(data.documents, settings.schedule.epochs, question.global_batch) if data.documents else None
    )
    return Plan(
        name=base.entry.name,
        model=question.model,
        num_parameters=question.model.num_parameters,
        data=data,
        epochs=None if settings.schedule.iters else settings.schedule.epochs,
        iterations=iterations,
        question=question,
        choice=choice,
        found=found,
        learning_rate=_learning_rate(settings),
        notes=tuple(notes),
    )


def _learning_rate(settings: Settings) -> str:
    schedule = settings.schedule
    return in_words(
        lr=schedule.lr,
        min_lr=schedule.min_lr,
        warmup=schedule.warmup_text,
        schedule=schedule.schedule,
        cycles=schedule.schedule_cycles,
        power=schedule.schedule_power,
        decay_fraction=schedule.decay_fraction,
    )


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The values chosen for what the flags leave open."""

    layout: Layout
    micro_batch: int
    recompute: str
    gpu: str  # the kind of GPU that was planned for, cpu, or "unknown"
    seconds: float | None = None  # per iteration
    note: str = ""  # why the layout differs from the entry's


def choose(settings: Settings, base: BaseModel, reader: ShardReader, world: int) -> Chosen:
    """Choose by the plan on known GPUs, and raise UserError if nothing fits. On other GPUs take the simplest layout,
    on a CPU the simplest that fits.
    """
    gpus = visible_gpus()
    gpu = machine(settings) if gpus else this_cpu(max(1, world // settings.machine.nodes))
    pack, share = _packed(reader, settings), trained_share(settings, reader)
    case = RunFacts(settings=settings, base=base, world=world, gpu=gpu, pack=pack, trained_share=share)
    if gpu is None:
        layout, note = case.simple_layout()
        return Chosen(
            layout=layout,
            micro_batch=settings.layout.micro_batch or max(1, _GPU_ROW_TOKENS // settings.data.seq),
            recompute=recompute_of(settings) or "none",
            gpu="unknown",
            note=_layout_note(note, layout),
        )
    asked = case.question()
    question = asked.question
    if gpus:
        choice = best(question)
        return Chosen(
            layout=choice.layout,
            micro_batch=choice.micro_batch,
            recompute=choice.recompute,
            gpu=gpu.name,
            seconds=choice.seconds.total,
            note=_layout_note(asked.note, choice.layout),
        )
    layout = layout_of(question, question.tp or 1, question.pp or 1)
    micro_batch, recompute = settings.layout.micro_batch or 1, recompute_of(settings)
    if recompute is None:
        found = search(replace(question, micro_batch=micro_batch))
        fitting = {choice.recompute for choice in found.fitting}
        recompute = next((way for way in RECOMPUTES if way in fitting), RECOMPUTES[-1])
    note = _layout_note(asked.note, layout)
    return Chosen(layout=layout, micro_batch=micro_batch, recompute=recompute, gpu=gpu.name, note=note)


def _layout_note(note: str | None, layout: Layout) -> str:
    return "" if note is None else f"{note}: using tp {layout.tp} x pp {layout.pp} instead"


def _batch_note(settings: Settings, layout: Layout) -> str:
    if settings.schedule.gradient_accumulation is None:
        return ""
    factors = (
        f"gradient_accumulation {settings.schedule.gradient_accumulation} x micro_batch "
        f"{settings.layout.micro_batch or 1} x dp {layout.dp}"
    )
    return f"{global_batch_of(settings, layout.dp):,} documents an iteration = {factors}"


def _packed(reader: ShardReader, settings: Settings) -> Pack:
    return lambda documents: batches_of(reader, sampler_of(settings, reader, documents))


def batches_of(reader: ShardReader, sampler: Sampler) -> Batches:
    """The batches of the first iterations. A document of n tokens has n - 1 predictions."""
    numbers = [sampler.documents(iteration).astype(np.int64) for iteration in range(_SAMPLED_ITERATIONS)]
    lengths = [np.maximum(reader.lengths[chosen].astype(np.int64) - 1, 1).tolist() for chosen in numbers]
    return Batches(lengths, [reader.trained[chosen].astype(np.int64).tolist() for chosen in numbers])


def trained_share(settings: Settings, reader: ShardReader) -> float:
    manifest = reader.manifest
    return 1.0 if settings.objective.loss_mask else manifest.trained_tokens / max(manifest.tokens, 1)


def _data(settings: Settings, notes: list[str]) -> tuple[Data, Pack, float]:
    """What is known about the data: from the shards, the given numbers, or the files. Assumptions are noted."""
    folder = dataset_folder(Path(settings.data.tokenized_data_dir), settings.data.run_name)
    if (folder / "manifest.json").exists():
        reader = ShardReader(folder)
        manifest = reader.manifest
        tokens, trained = manifest.tokens - len(reader), manifest.trained_tokens
        known = Data(documents=len(reader), tokens=tokens, trained_tokens=trained, source=f"shards in {folder}")
        return known, _packed(reader, settings), trained_share(settings, reader)
    known_number = known_documents(
        settings.data.run_name, Path(settings.model.checkpoints_file) if settings.model.checkpoints_file else None
    )
    counted = _count_rows(settings.data.data) if settings.data.data else None
    documents = known_number or (counted[0] if counted else None)
    length = (
        min(max(2, round(counted[1] / _BYTES_PER_TOKEN)), settings.data.seq) - 1 if counted else settings.data.seq - 1
    )
    source = "[documents] of checkpoints.toml" if known_number else "rows of the files" if counted else "not known"
    if counted:
        notes.append(
            f"no shards yet: documents are assumed to have {length + 1:,} tokens, {_BYTES_PER_TOKEN:g} bytes of "
            "the files each"
        )
    else:
        notes.append(
            f"no shards yet: documents are assumed to be as long as --seq, {settings.data.seq:,} tokens, the longest "
            "there can be"
        )
    notes.append("which tokens are trained is not known before the data are tokenised: planned as if all were")
    if documents is None:
        notes.append(
            "how many documents there are is not known: give --data, shards, [documents] in checkpoints.toml, or "
            "--iters"
        )
    places = None if documents is None else float(documents * length)
    known = Data(documents=documents, tokens=places, trained_tokens=None, source=source)
    return known, lambda documents: Batches.all_alike(documents, length), 1.0


def _count_rows(files: tuple[str, ...]) -> tuple[int, float] | None:
    """Returns (rows, bytes per row) of line-based files. None if there are other kinds."""
    rows, size = 0.0, 0.0
    for name in files:
        path = Path(name)
        if not name.endswith((".jsonl", ".jsonl.gz")):
            return None
        try:
            with gzip.open(path) if name.endswith(".gz") else path.open("rb") as stream:
                lines, length, left = 0, 0, _COUNTED_BYTES
                while left > 0 and (block := stream.read(2**20)):
                    lines, length, left = lines + block.count(b"\n"), length + len(block), left - len(block)
                is_whole = not stream.read(1)
        except OSError as error:
            raise UserError(f"--data {name}: {error.strerror or error}: give files that exist") from error
        factor = 1.0 if is_whole else max(1.0, path.stat().st_size / max(length, 1))
        rows, size = rows + max(lines, 1) * factor, size + length * factor
    return round(rows), size / max(rows, 1)


def _further_notes(settings: Settings, base: Described, question: Question, choice: Choice) -> list[str]:
    notes = []
    model = question.model
    if not model.is_known:
        notes.append(
            f"{model.kind} models are counted like Llama: memory and time are less accurate than for known families"
        )
    counted, stored = model.num_parameters, base.num_stored
    if stored is not None and abs(stored / counted - 1) > 0.02 and not model.is_tied:
        notes.append(f"the weights' files hold {stored:,} numbers, but the configuration describes {counted:,} of them")
    if (
        settings.layout.tp is None
        and settings.layout.pp is None
        and base.entry.tp is not None
        and question.gpu.name != "cpu"
    ):
        other = search(replace(question, tp=None, pp=None)).fitting
        if other and other[0].seconds.total < 0.95 * choice.seconds.total:
            flags = f"--tp {other[0].layout.tp} --pp {other[0].layout.pp}"
            gain = 1 - other[0].seconds.total / choice.seconds.total
            notes.append(
                f"tp and pp are those of the entry in checkpoints.toml; {flags} would take {gain:.0%} less time"
            )
    return notes


def scaling(settings: Settings, counts: list[int]) -> list[tuple[int, Plan | str]]:
    """The plan for other numbers of GPUs, or why there is none for each."""
    per_node = settings.machine.nproc_per_node or max(visible_gpus(), 1)
    rows: list[tuple[int, Plan | str]] = []
    for count in counts:
        here = min(count, max(per_node, 8))
        if count % here:
            rows.append((count, f"{count} GPUs do not fill whole nodes of {here}"))
            continue
        asked: dict[str, Any] = {"nproc_per_node": here, "nodes": count // here, "rank": 0}
        try:
            rows.append((count, make_plan(settings.replace(**asked))))
        except UserError as error:
            rows.append((count, str(error)))
    return rows
