"""Is training on a layout the same as training with plain transformers? Measured on the CPU, on a small model of the user's own shape."""

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
from sft.job import plain
from sft.job.plain import PlainStep
from sft.job.synthetic import SyntheticReader
from sft.model.build import BuiltStage, build_stage
from sft.model.selfcheck import self_check, tiny
from sft.plan.layout import Layout
from sft.plan.sampler import Sampler
from sft.plan.stages import layer_ranges

TOLERANCE = 1e-5
_DOCUMENTS, _GLOBAL_BATCH, _LONGEST, _SEED, _CLIP = 40, 12, 48, 7, 1.0
_SETTINGS = OptimizerSpec(name="adamw", lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-5, weight_decay=0.1)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One iteration, by plain transformers and by the layout."""

    iteration: int
    theirs: PlainStep
    ours: PlainStep

    @property
    def difference(self) -> float:
        """The larger relative one of loss and gradient norm."""
        return max(
            abs(self.ours.loss - self.theirs.loss) / abs(self.theirs.loss),
            abs(self.ours.grad_norm - self.theirs.grad_norm) / abs(self.theirs.grad_norm),
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    comparisons: list[Comparison]
    weights: float  # the largest difference of a parameter after the last iteration, relative to the largest of its tensor

    @property
    def is_equal(self) -> bool:
        return max([self.weights, *(comparison.difference for comparison in self.comparisons)]) <= TOLERANCE


def compare(config: Any, layout: Layout, *, iterations: int, loss_mask: float, recompute: str) -> Outcome | None:
    """What the processes of a comparison run. The first returns the outcome."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    device = start_worker(timeout_seconds=300, use_gpu=False)
    processes = form_groups(layout)
    small = tiny(config, least_layers=layout.pp)
    self_check(config, processes.tensor, layout.sequence_parallel, recompute=recompute)
    model = plain.make_model(small)
    built = build_stage(
        small, layer_ranges(small.num_hidden_layers, layout.pp)[processes.stage], processes.tensor,
        sequence_parallel=layout.sequence_parallel, recompute=recompute, dtype=torch.float32, device=device,
    )  # fmt: skip
    fill(built, dict(model.named_parameters()))
    pipeline = Pipeline(
        built, processes, optimizer=_SETTINGS, clip=_CLIP, device=device, vocabulary_size=small.vocab_size
    )  # fmt: skip
    reader: Any = SyntheticReader(_DOCUMENTS, small.vocab_size, _LONGEST)
    feed = Feed(
        reader, capacity=2 * _LONGEST, replicas=layout.dp, replica=processes.replica, loss_mask=loss_mask,
        multiple=layout.tp if layout.sequence_parallel else 1,
    )  # fmt: skip
    sampler = Sampler(_DOCUMENTS, max(_GLOBAL_BATCH, 2 * layout.dp), _SEED)
    records = list(train(pipeline, feed, sampler, reader, rate=lambda _: _SETTINGS.lr, start=0, iterations=iterations))
    ours = [PlainStep(record["loss"], record["grad_norm"]) for record in records]
    batches = [sampler.documents(number) for number in range(iterations)]
    steps = plain.train(model, reader, batches, loss_mask, _SETTINGS, _CLIP)  # on every process: each compares its own weights
    worst = torch.tensor([largest_difference(built, dict(model.named_parameters()))], dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    stop_worker()
    if processes.rank != 0:
        return None
    pairs = enumerate(zip(steps, ours, strict=True), 1)
    return Outcome(comparisons=[Comparison(iteration=k, theirs=a, ours=b) for k, (a, b) in pairs], weights=float(worst))


def fill(built: BuiltStage, whole: dict[str, nn.Parameter]) -> None:
    """This process's part of a whole model's parameters."""
    with torch.no_grad():
        for name, parameter in built.parameters.items():
            part = built.places[name].part
            parameter.copy_(part.take(whole[name]) if part else whole[name])


def largest_difference(built: BuiltStage, whole: dict[str, nn.Parameter]) -> float:
    """Relative to the largest value of each tensor."""
    worst = 0.0
    for name, parameter in built.parameters.items():
        part, expected = built.places[name].part, whole[name].detach()
        expected_part = part.take(expected) if part else expected
        worst = max(worst, float((parameter.detach() - expected_part).abs().max() / expected.abs().max()))
    return worst


def table(outcome: Outcome, layout: Layout, family: str) -> Sequence[str]:
    """Lines for a person."""
    lines = [f"{family}, {layout}, float32 on the CPU, against plain transformers", ""]
    lines.append(
        f"{'iteration':>9}  {'loss, plain':>13}  {'loss, layout':>13}  {'norm, plain':>12}  {'norm, layout':>12}  {'difference':>10}"
    )
    for c in outcome.comparisons:
        lines.append(
            f"{c.iteration:>9}  {c.theirs.loss:>13.8f}  {c.ours.loss:>13.8f}  {c.theirs.grad_norm:>13.7f}  {c.ours.grad_norm:>13.7f}  "
            f"{c.difference:>13.1e}"
        )
    lines += ["", f"weights after {len(outcome.comparisons)} iterations differ by at most {outcome.weights:.1e}"]
    verdict = "the same" if outcome.is_equal else "NOT the same"
    return [*lines, f"{verdict} within {TOLERANCE:.0e}"]
