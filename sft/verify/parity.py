"""Compares training on a layout with training by plain transformers, on the CPU, with a small model of the user's
shape.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sft.config.optimizer import OptimizerSpec
from sft.engine.feed import Feed
from sft.engine.groups import form_groups
from sft.engine.pipeline import Pipeline
from sft.engine.start import start_worker, stop_worker
from sft.engine.trainer import train
from sft.model.build import BuiltStage, build_stage
from sft.objective.cross_entropy import CrossEntropy
from sft.optimizer import states
from sft.plan.chunks import tokens_at_once
from sft.plan.layout import Layout
from sft.plan.sampler import Sampler
from sft.plan.stages import layer_ranges
from sft.verify import plain
from sft.verify.plain import PlainRun, PlainStep
from sft.verify.selfcheck import self_check, tiny
from sft.verify.synthetic import SyntheticReader

# Relative, of losses, gradient norms and updates of tensors. A number in bf16 is off by up to 2^-9, a loss is reached
# through tens of roundings, and AdamW makes as much of a small gradient, whose share of rounding is larger, as of a
# large one.
TOLERANCES = {torch.float32: (1e-5, 1e-5, 1e-3), torch.bfloat16: (1e-3, 1e-2, 0.2)}
_LEAST_UPDATE = 0.1  # per learning rate, iteration and weight: smaller updates are compared with this size
_FORMATS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_DOCUMENTS, _GLOBAL_BATCH, _LONGEST, _SEED, _CLIP = 40, 12, 48, 7, 1.0
_SETTINGS = OptimizerSpec(name="adamw", lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-5, weight_decay=0.1)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One iteration by plain transformers and by the layout."""

    iteration: int
    theirs: PlainStep
    ours: PlainStep

    @property
    def differences(self) -> tuple[float, float]:
        """Relative differences of loss and gradient norm."""
        return (
            abs(self.ours.loss - self.theirs.loss) / abs(self.theirs.loss),
            abs(self.ours.grad_norm - self.theirs.grad_norm) / abs(self.theirs.grad_norm),
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    comparisons: list[Comparison]
    updates: float  # the largest relative difference of a tensor's update over all iterations
    dtype: torch.dtype

    @property
    def is_equal(self) -> bool:
        loss, norm, updates = TOLERANCES[self.dtype]
        pairs = [comparison.differences for comparison in self.comparisons]
        return self.updates <= updates and all(one <= loss and other <= norm for one, other in pairs)


def compare(
    config: Any,
    layout: Layout,
    store: Any,
    *,
    iterations: int,
    loss_mask: float,
    recompute: str,
    dtype: torch.dtype = torch.float32,
) -> Outcome | None:
    """Run the comparison on each process. The first one returns the outcome."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    device = start_worker(store, timeout_seconds=300, use_gpu=False)
    processes = form_groups(layout)
    small = tiny(config, least_layers=layout.pp)
    self_check(config, processes.tensor, layout.sequence_parallel, recompute=recompute, dtype=dtype)
    model = plain.make_model(small, dtype)
    built = build_stage(
        small,
        layer_ranges(small.num_hidden_layers, layout.pp)[processes.stage],
        processes.tensor,
        sequence_parallel=layout.sequence_parallel,
        recompute=recompute,
        dtype=dtype,
        device=device,
    )
    fill(built, dict(model.named_parameters()))
    pipeline = Pipeline(
        built,
        processes,
        optimizer=_SETTINGS,
        objective=CrossEntropy(loss_mask=loss_mask),
        tokens_at_once=tokens_at_once(-(-small.vocab_size // layout.tp), False),
        clip=_CLIP,
        device=device,
        vocabulary_size=small.vocab_size,
    )
    reader: Any = SyntheticReader(_DOCUMENTS, small.vocab_size, _LONGEST)
    feed = _feed(reader, layout, pipeline)
    sampler = Sampler(_DOCUMENTS, max(_GLOBAL_BATCH, 2 * layout.dp), _SEED)
    records = list(train(pipeline, feed, sampler, reader, rate=lambda _: _SETTINGS.lr, start=0, iterations=iterations))
    ours = [PlainStep(record["loss"], record["grad_norm"]) for record in records]
    batches = [sampler.documents(number) for number in range(iterations)]
    # Compare this process's own weights.
    run = plain.train(model, reader, batches, loss_mask, _SETTINGS, _CLIP)
    worst = torch.tensor([_difference(pipeline, run, iterations)], dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    stop_worker()
    if processes.rank != 0:
        return None
    pairs = enumerate(zip(run.steps, ours, strict=True), 1)
    return Outcome(
        comparisons=[Comparison(iteration=k, theirs=a, ours=b) for k, (a, b) in pairs],
        updates=float(worst),
        dtype=dtype,
    )


def _feed(reader: Any, layout: Layout, pipeline: Pipeline) -> Feed:
    return Feed(
        reader,
        capacity=2 * _LONGEST,
        replicas=layout.dp,
        replica=pipeline.processes.replica,
        objective=pipeline.objective,
        multiple=layout.tp if layout.sequence_parallel else 1,
    )


def fill(built: BuiltStage, whole: dict[str, nn.Parameter]) -> None:
    """Fill this process's parts from a whole model's parameters."""
    with torch.no_grad():
        for name, parameter in built.parameters.items():
            part = built.places[name].part
            parameter.copy_(part.take(whole[name]) if part else whole[name])


def _difference(pipeline: Pipeline, theirs: PlainRun, iterations: int) -> float:
    """The largest difference among updates of float32 weights that this process owns."""
    worst = 0.0
    for piece in states.pieces(pipeline.optimizer):
        if piece.state == states.MASTER:
            part = pipeline.built.places[piece.name].part
            own = slice(piece.offset, piece.offset + piece.numbers().numel())
            end, update = (
                (part.take(one) if part else one).reshape(-1)[own]
                for one in (theirs.masters[piece.name], theirs.updates[piece.name])
            )
            least = _LEAST_UPDATE * _SETTINGS.lr * iterations * update.numel() ** 0.5
            worst = max(worst, float((piece.numbers() - end).norm()) / max(float(update.norm()), least))
    return worst


def table(outcome: Outcome, layout: Layout, family: str) -> Sequence[str]:
    """Format the outcome as lines."""
    lines = [f"{family}, {layout}, {_FORMATS[outcome.dtype]} on the CPU, against plain transformers", ""]
    lines.append(
        f"{'iteration':>9}  {'loss, plain':>13}  {'loss, layout':>13}  {'norm, plain':>12}  {'norm, layout':>12} "
        f" {'difference':>10}"
    )
    for c in outcome.comparisons:
        lines.append(
            f"{c.iteration:>9}  {c.theirs.loss:>13.8f}  {c.ours.loss:>13.8f}  {c.theirs.grad_norm:>13.7f}  "
            f"{c.ours.grad_norm:>13.7f}  "
            f"{max(c.differences):>13.1e}"
        )
    lines += [
        "",
        (
            f"updates of a tensor by {len(outcome.comparisons)} iterations differ by at most {outcome.updates:.1e} "
            "of their size"
        ),
    ]
    verdict = "the same" if outcome.is_equal else "NOT the same"
    loss, norm, updates = TOLERANCES[outcome.dtype]
    return [*lines, f"{verdict} within {loss:.0e} (losses), {norm:.0e} (norms) and {updates:.0e} (updates)"]
