"""Estimates how long a trial takes before it starts; the only place in `sweep` that uses the planner."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from sft.config.recipe import make_settings
from sft.config.settings import Settings
from sft.model.base_folder import gguf_file_in
from sft.plan.sampler import num_iterations
from sft.resolve.base import find_base_model
from sft.resolve.devices import visible_gpus
from sft.resolve.planning import make_plan
from sft.resolve.question import global_batch_of
from sft.resolve.speed import expected_seconds
from tokenize_data.bases import find_base
from tokenize_data.dataset import DatasetSpec
from tokenize_data.errors import UserError
from tokenize_data.manifest import dataset_folder
from tokenize_data.reader import ShardReader

_START_SECONDS = 12.0  # imports, reading and writing the model
_BYTES_PER_TOKEN = 4.0


def expected(values: Mapping[str, Any], world: int) -> float | None:
    """The maximum duration in seconds; a run may stop early. None if the model or the data is not on this machine."""
    settings = make_settings(values)
    if not _is_here(settings):
        return None
    if visible_gpus():
        return _planned(settings.replace(nproc_per_node=world))
    size = _documents_and_tokens(settings)
    if size is None:
        return None
    documents, tokens = size
    global_batch = global_batch_of(settings, max(1, world // ((settings.layout.tp or 1) * (settings.layout.pp or 1))))
    iterations = settings.schedule.iters or num_iterations(documents, settings.schedule.epochs, global_batch)
    per_document = _seconds_per_operation() * find_base_model(settings).num_parameters * tokens / max(documents, 1)
    return _START_SECONDS + per_document * iterations * global_batch


def _planned(settings: Settings) -> float | None:
    """The duration planned for GPUs."""
    plan = make_plan(settings)
    return None if plan.iterations is None else _START_SECONDS + plan.iterations * plan.choice.seconds.total


def _is_here(settings: Settings) -> bool:
    """Whether the base model is on this machine: an estimate fetches nothing."""
    if gguf_file_in(settings.model.checkpoint) is not None:
        return True
    file = Path(settings.model.checkpoints_file) if settings.model.checkpoints_file else None
    return Path(find_base(settings.model.checkpoint, settings.model.size, file).path).expanduser().exists()


@cache
def _seconds_per_operation() -> float:
    """Seconds per parameter and token on this CPU."""
    return expected_seconds(1, 1.0)


def _documents_and_tokens(settings: Settings) -> tuple[int, float] | None:
    """Documents and tokens of existing shards, or estimated from file sizes."""
    try:
        reader = ShardReader(dataset_folder(Path(settings.data.tokenized_data_dir), settings.data.run_name))
        return len(reader), float(reader.manifest.tokens)
    except UserError:
        pass
    specs = (
        settings.data.datasets or (DatasetSpec(files=settings.data.data, samples=settings.data.samples),)
        if settings.data.datasets or settings.data.data
        else ()
    )
    counts = [_estimate(spec, settings.data.seq) for spec in specs]
    if not counts or None in counts:
        return None
    known = [count for count in counts if count is not None]
    return sum(count[0] for count in known), sum(count[1] for count in known)


def _estimate(spec: DatasetSpec, seq: int) -> tuple[int, float] | None:
    rows, size = 0, 0
    for name in spec.files:
        path = Path(name).expanduser()
        if path.suffix not in (".jsonl", ".ndjson") or not path.is_file():
            return None
        with path.open("rb") as file:
            for line in file:
                rows, size = rows + 1, size + len(line)
    taken = min(spec.samples or round(rows * spec.weight), rows if spec.samples else round(rows * spec.weight))
    mean = min(size / max(rows, 1) / _BYTES_PER_TOKEN, float(seq))
    return taken, taken * mean
