"""What workers do in tests that are no layouts of a healthy training: numbers that are not finite, bfloat16, plans that
are wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from sft.families.table import FAMILIES
from sft.model import parallel_layers, tensor_parallel
from sft.verify import selfcheck
from tests.distributed.worker import Run, layout_of, prepare
from tests.models import tiny_config

POISONED_RANK = 1


def not_finite(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """One good iteration, then one with something that is not a number on one rank."""
    from sft.spec.errors import TrainingError

    run = prepare(case, device)
    records = run.train()
    next(records)
    with _POISONS[case["poison"]](run):
        before, error = run.weights(), ""
        try:
            next(records)
        except TrainingError as caught:
            error = str(caught)
    changed = [
        name
        for name, weight in run.weights().items()
        if not torch.equal(weight.nan_to_num(7.0), before[name].nan_to_num(7.0))
    ]
    batch = run.feed.plan(run.sampler.documents(1))
    rows = [[int(batch.numbers[position]) for position in row] for row in batch.plan.rows[run.processes.replica]]
    return {"error": error, "changed": changed, "rows": rows, "replica": run.processes.replica}


def _poison_parameter(run: Run) -> Any:
    if dist.get_rank() == POISONED_RANK:
        with torch.no_grad():
            next(parameter for name, parameter in run.built.parameters.items() if "q_proj" in name).view(-1)[0] = float(
                "nan"
            )
    return mock.MagicMock()


def _poison_loss(run: Run) -> Any:
    """The loss of the second micro-batch of replica 1."""
    calls: list[int] = []
    loss = run.pipeline.loss
    original = loss._likelihood

    def poisoned(*arguments: Any) -> Tensor:
        calls.append(1)
        result = original(*arguments)
        return result * float("inf") if run.processes.replica == 1 and len(calls) == 2 else result

    return mock.patch.object(loss, "_likelihood", poisoned)


def _poison_gradient(run: Run) -> Any:
    if dist.get_rank() == POISONED_RANK:
        next(iter(run.built.parameters.values())).register_hook(lambda gradient: gradient + float("inf"))
    return mock.MagicMock()


_POISONS: dict[str, Callable[[Run], Any]] = {
    "parameter": _poison_parameter,
    "loss": _poison_loss,
    "gradient": _poison_gradient,
}


def masters(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """bfloat16 with a rate whose single updates are below its resolution: weights and their float32 masters after each
    iteration.
    """
    run = prepare(case, device)
    shard = next(shard for shard in run.pipeline.optimizer.shards if shard.is_matrix and "proj" in shard.name)

    def both() -> tuple[Tensor, Tensor]:
        return shard.parameter.detach()[shard.rows.start : shard.rows.stop].clone(), shard.weights.detach().clone()

    history = [both()]
    history += [both() for _ in run.train(case["lr"])]
    return {"name": shard.name, "history": history}


def check(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The self-check by all ranks together, as it is or with a mistake put in."""
    from sft.engine.groups import form_groups

    group = form_groups(layout_of(case)).tensor
    with _MISTAKES[case.get("mistake", "none")]():
        return {"worst": selfcheck.self_check(tiny_config(case["family"]), group, case.get("sequence_parallel", False))}


def _norm_in_a_region_taken_for_whole() -> Any:
    return mock.patch.object(tensor_parallel._LayerBuilder, "_note_partial", return_value=None)


def _bias_added_by_every_rank() -> Any:
    def forward(self: Any, hidden: Tensor) -> Tensor:
        output = torch.nn.functional.linear(hidden, self.weight, self.bias)
        return parallel_layers.collectives.leave_region(output, self._group, self._stretches)

    return mock.patch.object(parallel_layers.RowParallel, "forward", forward)


def _halves_cut_as_one() -> Any:
    family = FAMILIES["phi3"]
    wrong = replace(
        family, tensor_plan=lambda config: {**(family.tensor_plan(config) or {}), "mlp.gate_up_proj": "colwise"}
    )
    return mock.patch.dict(FAMILIES, {"phi3": wrong})


def _wrong_on_one_rank() -> Any:
    return mock.patch.object(selfcheck, "_difference", return_value=1.0) if dist.get_rank() == 0 else mock.MagicMock()


_MISTAKES: dict[str, Callable[[], Any]] = {
    "none": mock.MagicMock,
    "norm": _norm_in_a_region_taken_for_whole,
    "bias": _bias_added_by_every_rank,
    "halves": _halves_cut_as_one,
    "one rank": _wrong_on_one_rank,
}
