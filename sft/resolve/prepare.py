"""What a run will do, decided before any process starts: base model, data, iterations, layout, batches, output
folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from sft.config.settings import Settings
from sft.launcher import processes
from sft.observe.header import Facts
from sft.plan.architecture import Architecture, head_cost
from sft.plan.experts import check_no_experts
from sft.plan.layout import Layout, ModelShape
from sft.plan.packing import plan_batch
from sft.plan.placement import Placement
from sft.plan.sampler import Sampler, num_iterations
from sft.plan.stages import layer_ranges
from sft.resolve import adapters
from sft.resolve.base import BaseModel, find_base_model, tokenizer_flags
from sft.resolve.devices import check_torch, visible_gpus
from sft.resolve.naming import run_folder
from sft.resolve.planning import choose, trained_share
from sft.resolve.question import settled
from sft.resolve.speed import expected_seconds
from tokenize_data import __version__
from tokenize_data.errors import UserError
from tokenize_data.flags import flags_of
from tokenize_data.manifest import dataset_folder
from tokenize_data.reader import ShardReader
from tokenize_data.recipe import dataset_values
from tokenize_data.recipe_file import escaped

_SAMPLED_ITERATIONS = 20
_PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that all processes of a run agree on."""

    settings: Settings
    base: BaseModel
    reader: ShardReader
    validation: ShardReader | None
    iterations: int
    layout: Layout
    micro_batch: int
    recompute: str
    dtype: str
    folder: Path
    seconds_per_iteration: float | None = None  # as planned; None where that is not known
    layout_note: str = ""  # why it is not what the entry says

    @property
    def capacity(self) -> int:
        """Tokens in a row."""
        return self.micro_batch * self.settings.data.seq

    @property
    def sampler(self) -> Sampler:
        return Sampler(len(self.reader), self.settings.schedule.global_batch, self.settings.data.seed)

    @property
    def result_folder(self) -> Path:
        """What is there when the run is finished."""
        return self.folder / ("hf" if self.settings.adapters.lora is None else "adapter")


def tokenise(settings: Settings, base: BaseModel) -> int:
    """Run the data stage, which says what it does. Returns its exit code. A base that cannot be trained is refused
    first.
    """
    check_torch(visible_gpus())
    check_no_experts(base.config)
    command = [sys.executable, "-m", "tokenize_data", *flags_of(settings.data), *tokenizer_flags(settings, base)]
    if not (settings.data.datasets or settings.data.val_datasets):
        return _run_data_stage(command)
    with tempfile.TemporaryDirectory(prefix="sft-") as scratch:  # the lists alone: everything else are flags here
        file = Path(scratch, "datasets.yaml")
        lists = {name: [dataset_values(spec) for spec in settings.value(name)] for name in ("datasets", "val_datasets")}
        file.write_text(json.dumps(escaped(lists)))
        return _run_data_stage([*command, "--config", str(file)])


def _run_data_stage(command: list[str]) -> int:
    code = subprocess.run(command).returncode
    known = (processes.EXIT_OK, processes.EXIT_USER_ERROR, processes.EXIT_FAILED)
    return processes.as_exit_code("train", "the data stage (tokenize_data)", code, known)


def make_job(settings: Settings, base: BaseModel | None = None, world: int | None = None) -> Job:
    """The job, from shards that are there. Every process that is given the same flags makes the same one."""
    settings = adapters.with_adapter(settings)
    base = base or find_base_model(settings)
    adapters.check_base(settings, base)
    root = Path(settings.data.tokenized_data_dir)
    reader = ShardReader(dataset_folder(root, settings.data.run_name)).keep_open()
    validation = (
        ShardReader(dataset_folder(root, f"{settings.data.run_name}-val")).keep_open()
        if settings.data.has_validation
        else None
    )
    for part in (reader, validation):
        if part is not None and part.manifest.seq > settings.data.seq:
            raise UserError(
                f"{part.folder} was tokenised with --seq {part.manifest.seq}, longer than --seq {settings.data.seq}: "
                f"use --seq {part.manifest.seq}, or --retokenize"
            )
    on_gpu = visible_gpus() > 0
    if world is None:
        world = settings.machine.nodes * (settings.machine.nproc_per_node or max(visible_gpus(), 1))
    chosen = choose(settings, base, reader, world)
    settings = settled(settings, chosen.layout)
    if settings.output.early_stopping and validation is None:
        raise UserError(
            f"--early_stopping {settings.output.early_stopping} needs a validation set: name one with --val"
        )
    iterations = settings.schedule.iters or num_iterations(
        len(reader), settings.schedule.epochs, settings.schedule.global_batch
    )
    _check_context(reader, base)
    return Job(
        settings=settings,
        base=base,
        reader=reader,
        validation=validation,
        iterations=iterations,
        layout=chosen.layout,
        micro_batch=chosen.micro_batch,
        recompute=chosen.recompute,
        dtype=settings.model.dtype or ("bf16" if on_gpu else "fp32"),
        folder=run_folder(settings, base.family, base.is_entry),
        seconds_per_iteration=chosen.seconds,
        layout_note=chosen.note,
    )


def stage_layers(job: Job) -> list[range]:
    """The layers of each pipeline stage. The head costs what it computes: trained tokens alone, against all tokens in a
    layer.
    """
    model = Architecture.of_config(job.base.config)
    return layer_ranges(
        model.layers, job.layout.pp, head_cost=head_cost(model, trained_share(job.settings, job.reader))
    )


def _check_context(reader: ShardReader, base: BaseModel) -> None:
    """Learned positions end somewhere; rotary ones only get worse."""
    limit = base.config.get("max_position_embeddings")
    longest = int(reader.lengths.max())
    if base.family == "opt" and isinstance(limit, int) and longest - 1 > limit:
        raise UserError(
            f"{reader.folder} has documents of {longest:,} tokens, this model {limit:,} positions: tokenise with "
            f"--seq {limit}"
        )


def facts_of(job: Job, start: int = 0) -> Facts:
    """What the header shows, with the fill and balance of the first iterations' batches."""
    settings, manifest = job.settings, job.reader.manifest
    plans = []
    for number in range(start, min(job.iterations, start + _SAMPLED_ITERATIONS)):
        lengths = job.reader.lengths[job.sampler.documents(number)].astype(np.int64) - 1
        plans.append(plan_batch(lengths.tolist(), job.capacity, job.layout.dp))
    mean_length = manifest.tokens / max(len(job.reader), 1)
    tokens_left = (job.iterations - start) * settings.schedule.global_batch * mean_length
    vocabulary = max(int(job.base.config.get("vocab_size", 0)), int(manifest.tokenizer["vocabulary_size"]))
    return Facts(
        family=f"{job.base.entry.name} ({job.base.family})",
        num_parameters=job.base.num_parameters,
        vocabulary_size=vocabulary,
        tp=job.layout.tp,
        pp=job.layout.pp,
        dp=job.layout.dp,
        micro_batch=job.micro_batch,
        seq=settings.data.seq,
        sequence_parallel=job.layout.sequence_parallel,
        recompute=job.recompute,
        dtype=job.dtype,
        num_documents=len(job.reader),
        num_tokens=manifest.tokens,
        num_trained_tokens=manifest.trained_tokens,
        num_val_documents=len(job.validation) if job.validation else 0,
        fill=_mean([plan.fill for plan in plans]),
        balance=_mean([plan.balance for plan in plans]),
        epochs=None if settings.schedule.iters else settings.schedule.epochs,
        global_batch=settings.schedule.global_batch,
        iterations=job.iterations,
        start=start,
        folder=job.folder,
        placement=placement_of(job).text() if settings.machine.nodes > 1 else "",
        adapters=adapters.description(settings),
        layout_note=job.layout_note,
        expected_seconds=_expected_seconds(job, start, tokens_left),
    )


def placement_of(job: Job) -> Placement:
    return Placement(layout=job.layout, per_node=-(-job.layout.world // job.settings.machine.nodes))


def placement_warning(job: Job) -> str | None:
    """What it costs that tensor groups span nodes."""
    shape = ModelShape.of_config(job.base.config)
    hidden = job.base.config.get("hidden_size")
    if job.settings.machine.nodes == 1 or shape.layers is None or not isinstance(hidden, int):
        return None
    return placement_of(job).warning(
        layers=shape.layers, hidden=hidden, row_tokens=job.capacity, bytes_per_value=2 if job.dtype == "bf16" else 4
    )


def _expected_seconds(job: Job, start: int, tokens_left: float) -> float | None:
    if visible_gpus():
        return None if job.seconds_per_iteration is None else (job.iterations - start) * job.seconds_per_iteration
    return expected_seconds(job.base.num_parameters, tokens_left)


def resolved_facts(job: Job) -> dict[str, Any]:
    """What run.toml records besides the configuration."""
    return {
        "base": job.base.entry.path,
        "base_folder": str(job.base.folder.resolve()),
        "base_fingerprint": job.base.fingerprint,
        "adapter_fingerprint": adapters.fingerprint(job.settings),
        "model_type": job.base.family,
        "iterations": job.iterations,
        "documents": len(job.reader),
        "data": job.reader.manifest.fingerprint(),
        "data_folder": str(job.reader.folder.resolve()),
        "tp": job.layout.tp,
        "pp": job.layout.pp,
        "dp": job.layout.dp,
        "sequence_parallel": job.layout.sequence_parallel,
        "micro_batch": job.micro_batch,
        "recompute": job.recompute,
        "dtype": job.dtype,
    }


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0], "sft": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
