"""Collects the facts for the header that a run shows before it starts."""

from __future__ import annotations

import numpy as np

from sft.config.output import KEEP_BEST
from sft.observe.header import Facts
from sft.plan.layout import ModelShape
from sft.plan.packing import plan_batch
from sft.plan.placement import Placement
from sft.resolve import adapters
from sft.resolve.devices import visible_gpus
from sft.resolve.speed import expected_seconds
from sft.spec.run import RunSpec
from tokenize_data.reader import ShardReader

_SAMPLED_ITERATIONS = 20


def facts_of(spec: RunSpec, start: int = 0) -> Facts:
    """The header's facts, including fill and balance of the first iterations' batches."""
    settings, reader = spec.settings, ShardReader(spec.data.folder)
    sampler = spec.sampler  # one for all iterations: it keeps an epoch's permutation
    plans = []
    for number in range(start, min(spec.iterations, start + _SAMPLED_ITERATIONS)):
        lengths = reader.lengths[sampler.documents(number)].astype(np.int64) - 1
        plans.append(plan_batch(lengths.tolist(), spec.capacity, spec.layout.dp))
    mean_length = spec.data.tokens / max(spec.data.documents, 1)
    tokens_left = (spec.iterations - start) * settings.schedule.global_batch * mean_length
    return Facts(
        family=f"{spec.base.entry.name} ({spec.base.family})",
        num_parameters=spec.base.num_parameters,
        vocabulary_size=spec.vocabulary_size,
        tp=spec.layout.tp,
        pp=spec.layout.pp,
        dp=spec.layout.dp,
        micro_batch=spec.micro_batch,
        seq=settings.data.seq,
        sequence_parallel=spec.layout.sequence_parallel,
        recompute=spec.recompute,
        dtype=spec.dtype,
        num_documents=spec.data.documents,
        num_tokens=spec.data.tokens,
        num_trained_tokens=spec.data.trained_tokens,
        num_val_documents=spec.validation.documents if spec.validation else 0,
        fill=_mean([plan.fill for plan in plans]),
        balance=_mean([plan.balance for plan in plans]),
        epochs=None if spec.asked.schedule.iters else settings.schedule.epochs,
        global_batch=settings.schedule.global_batch,
        iterations=spec.iterations,
        start=start,
        folder=spec.folder,
        placement=placement_of(spec).text() if settings.machine.nodes > 1 else "",
        adapters=adapters.description(settings),
        layout_note=spec.layout_note,
        expected_seconds=_expected_seconds(spec, start, tokens_left),
    )


def placement_of(spec: RunSpec) -> Placement:
    return Placement(layout=spec.layout, per_node=-(-spec.layout.world // spec.settings.machine.nodes))


def placement_warning(spec: RunSpec) -> str | None:
    """Warn if tensor-parallel groups span nodes, with the cost."""
    shape = ModelShape.of_config(spec.base.config)
    hidden = spec.base.config.get("hidden_size")
    if spec.settings.machine.nodes == 1 or shape.layers is None or not isinstance(hidden, int):
        return None
    return placement_of(spec).warning(
        layers=shape.layers, hidden=hidden, row_tokens=spec.capacity, bytes_per_value=2 if spec.dtype == "bf16" else 4
    )


def early_stopping_warning(spec: RunSpec) -> str | None:
    """Warn if the run ends before early stopping can trigger."""
    output = spec.settings.output
    patience = output.early_stopping
    if patience is None or patience >= KEEP_BEST:
        return None
    earlier = (spec.iterations - 1) // output.eval_interval  # there is always a validation at the end
    if patience < earlier:
        return None
    times = f"{earlier} validation{'' if earlier == 1 else 's'} before its end"
    return (
        f"--early_stopping {patience} cannot stop this run, which has {times} ({spec.iterations:,} iterations, one "
        f"every {output.eval_interval:,}): lower one of them; the best model is kept anyway"
    )


def _expected_seconds(spec: RunSpec, start: int, tokens_left: float) -> float | None:
    if visible_gpus():
        return None if spec.seconds_per_iteration is None else (spec.iterations - start) * spec.seconds_per_iteration
    return expected_seconds(spec.base.num_parameters, tokens_left)


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
