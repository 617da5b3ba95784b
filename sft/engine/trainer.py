"""Runs iterations and validations and yields their records. Callers decide what to do with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from sft.engine.feed import Batch, Feed
from sft.engine.pipeline import NotFiniteError, Pipeline
from sft.plan.sampler import Sampler
from sft.spec.errors import TrainingError
from tokenize_data.reader import ShardReader

VALIDATION_DOCUMENTS = 1024  # number of validation documents that are planned together
_NAMED_DOCUMENTS = 10


def train(
    pipeline: Pipeline,
    feed: Feed,
    sampler: Sampler,
    reader: ShardReader,
    *,
    rate: Callable[[int], float],
    start: int,
    iterations: int,
) -> Iterator[dict[str, Any]]:
    """Yield one record per iteration, from `start` + 1 to `iterations`."""
    seen = sampler.seen(start) if sampler.mix else None
    for number in range(start + 1, iterations + 1):
        began = time.perf_counter()
        batch = feed.plan(sampler.documents(number - 1))
        lr = rate(number)
        try:
            result = pipeline.step(feed.micro_batches(batch), feed.row_lengths(batch), lr)
        except NotFiniteError:
            raise TrainingError(_not_finite(pipeline, batch, reader, number)) from None
        seconds = time.perf_counter() - began
        seen = seen + sampler.count(batch.numbers) if seen is not None else None
        yield {
            "iteration": number,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "documents": len(batch.numbers),
            "tokens": batch.num_tokens,
            "trained_tokens": batch.num_trained,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(batch.num_tokens / seconds, 1),
            "micro_batches": batch.plan.num_micro_batches,
            "fill": round(batch.plan.fill, 4),
            "balance": round(batch.plan.balance, 4),
            **_shares(sampler, seen),
        }


def validate(pipeline: Pipeline, feed: Feed, parts: Mapping[str, range]) -> dict[str, float]:
    """The exact metrics of a validation set, equal on every process and layout. Several parts have their own metrics,
    such as `val_loss/NAME`.
    """
    began = time.perf_counter()
    replicas = pipeline.processes.layout.dp
    found: dict[str, float] = {}
    total = [0.0] * pipeline.objective.num_sums
    for name, part in parts.items():
        for first in range(part.start, part.stop, VALIDATION_DOCUMENTS):
            numbers = np.arange(first, min(first + VALIDATION_DOCUMENTS, part.stop))
            batch, micro_batches = feed.plan_for_validation(numbers, replicas)
            pipeline.evaluate(micro_batches, feed.row_lengths(batch))
        sums = pipeline.sums()
        total = [one + other for one, other in zip(total, sums, strict=True)]
        if len(parts) > 1:
            found |= {f"{key}/{name}": value for key, value in pipeline.objective.figures(sums).items()}
    seconds = round(time.perf_counter() - began, 4)
    figures = pipeline.objective.figures(total)
    return {**figures, **found, "val_documents": sum(map(len, parts.values())), "val_seconds": seconds}


def _shares(sampler: Sampler, seen: np.ndarray | None) -> dict[str, float]:
    """The share of each data set in the documents trained so far."""
    if seen is None:
        return {}
    names, total = [part.name for part in sampler.mix], float(seen.sum())
    return {f"seen/{name}": round(count / total, 6) for name, count in zip(names, seen.tolist(), strict=True)}


def _not_finite(pipeline: Pipeline, batch: Batch, reader: ShardReader, iteration: int) -> str:
    rows = pipeline.rows_not_finite()
    positions = [position for replica, m in rows for position in batch.plan.rows[replica][m]]
    numbers = sorted(
        {int(batch.numbers[position]) for position in positions} or {int(number) for number in batch.numbers}
    )
    places = [
        f"{number} ({file} line {line})"
        for number in numbers[:_NAMED_DOCUMENTS]
        for file, line in [reader.place(number)]
    ]
    more = f" and {len(numbers) - _NAMED_DOCUMENTS} more" if len(numbers) > _NAMED_DOCUMENTS else ""
    what = "loss" if rows else "gradient"
    return (
        f"the {what} is not a finite number in iteration {iteration}, which was not applied; documents "
        f"{', '.join(places)}{more}: "
        "look at them with `sft inspect --row`, or use a smaller --lr"
    )
