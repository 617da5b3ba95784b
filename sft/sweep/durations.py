"""How long a trial may take, before it starts. The one place that asks what `sft plan` knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from sft.config.recipe import make_config
from sft.config.train import TrainConfig
from sft.model.base_folder import gguf_file_in
from sft.plan.sampler import num_iterations
from sft.resolve.base import find_base_model
from sft.resolve.devices import visible_gpus
from sft.resolve.planning import make_plan
from sft.resolve.question import global_batch_of
from sft.resolve.speed import expected_seconds
from tokenize_data.bases import find_base
from tokenize_data.errors import UserError
from tokenize_data.manifest import dataset_folder
from tokenize_data.reader import ShardReader
from tokenize_data.records import DatasetSpec

_START_SECONDS = 12.0  # imports, reading the model, writing it
_BYTES_PER_TOKEN = 4.0


def expected(values: Mapping[str, Any], world: int) -> float | None:
    """Seconds, at most (a run may stop early). None where that is not known: without the model or the data at hand."""
    config = make_config(values)
    if not _is_here(config):
        return None
    if visible_gpus():
        return _planned(replace(config, nproc_per_node=world))
    size = _documents_and_tokens(config)
    if size is None:
        return None
    documents, tokens = size
    global_batch = global_batch_of(config, max(1, world // ((config.tp or 1) * (config.pp or 1))))
    iterations = config.iters or num_iterations(documents, config.epochs, global_batch)
    per_document = _seconds_per_operation() * find_base_model(config).num_parameters * tokens / max(documents, 1)
    return _START_SECONDS + per_document * iterations * global_batch


def _planned(config: TrainConfig) -> float | None:
    """By `sft plan`, on GPUs."""
    plan = make_plan(config)
    return None if plan.iterations is None else _START_SECONDS + plan.iterations * plan.choice.seconds.total


def _is_here(config: TrainConfig) -> bool:
    """Nothing is fetched for an estimate."""
    if gguf_file_in(config.checkpoint) is not None:
        return True
    file = Path(config.checkpoints_file) if config.checkpoints_file else None
    return Path(find_base(config.checkpoint, config.size, file).path).expanduser().exists()


@cache
def _seconds_per_operation() -> float:
    """For each parameter and token, on this CPU."""
    return expected_seconds(1, 1.0)


def _documents_and_tokens(config: TrainConfig) -> tuple[int, float] | None:
    """Of the shards that are there; else estimated from the files' sizes."""
    try:
        reader = ShardReader(dataset_folder(Path(config.tokenized_data_dir), config.run_name))
        return len(reader), float(reader.manifest.tokens)
    except UserError:
        pass
    specs = (
        config.datasets or (DatasetSpec(files=config.data, samples=config.samples),)
        if config.datasets or config.data
        else ()
    )
    counts = [_estimate(spec, config.seq) for spec in specs]
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
