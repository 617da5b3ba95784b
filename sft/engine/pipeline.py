"""DeepSpeed's pipeline engine around a stage. This file, `start` and `groups` hold everything that relies on
DeepSpeed.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, nn

from sft.config.optimizer import OptimizerSpec
from sft.engine.feed import MicroBatch
from sft.engine.groups import Processes
from sft.engine.loss import MicroBatchLoss
from sft.engine.sending import sent
from sft.model.build import BuiltStage
from sft.model.quantized import widen_norms
from sft.objective.interface import Objective
from sft.objective.likelihood import Likelihood, negative_log_likelihood
from sft.optimizer.sharded import Groups, ShardedOptimizer, Trained

NEVER = 10**9


class NotFiniteError(Exception):
    """A loss or a gradient is not finite. Raised on every process, before the update."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    loss: float
    grad_norm: float


class _OneStagePipeline(PipelineModule):  # type: ignore[misc]  # DeepSpeed has no types
    """A DeepSpeed pipeline whose only local layer is our whole stage, so that we decide where to split."""

    def __init__(self, stage: nn.Module, processes: Processes, loss: MicroBatchLoss) -> None:
        layers: list[Any] = [LayerSpec(nn.Identity) for _ in range(processes.layout.pp)]
        layers[processes.stage] = stage
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the topology
            super().__init__(
                layers=layers, topology=processes.topology, loss_fn=loss, partition_method="uniform", dynamic_shape=True
            )


class Pipeline:
    """One process's part of the training pipeline. Iterations and validations are collective calls."""

    def __init__(
        self,
        built: BuiltStage,
        processes: Processes,
        *,
        optimizer: OptimizerSpec,
        objective: Objective,
        tokens_at_once: int,
        clip: float,
        device: torch.device,
        vocabulary_size: int,
        is_interrupted: Callable[[], bool] = lambda: False,
        likelihood: Likelihood = negative_log_likelihood,
    ) -> None:
        self.built, self.processes, self.device = built, processes, device
        self._is_interrupted = is_interrupted
        self.should_stop = False  # after a step: whether a signal has reached any process; equal on all processes
        self.objective = objective
        self.loss = MicroBatchLoss(
            objective, built.stage, vocabulary_size, processes.tensor, tokens_at_once, likelihood
        )
        with processes.communicators.lent():
            module = _OneStagePipeline(built.stage, processes, self.loss)
        self.optimizer = ShardedOptimizer(
            _trained(built, processes),
            optimizer,
            Groups(tensor=processes.tensor, replicas=processes.replicas, tied=processes.tied),
            clip=clip,
            device=device,
            votes=self._votes,
            approve=self._approve,
        )
        with contextlib.redirect_stdout(io.StringIO()), processes.communicators.lent():
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=self.optimizer,
                config=_deepspeed_config(processes.layout.dp),
                dist_init_required=False,
            )
        self._engine.pipeline_enable_backward_allreduce = False  # the optimizer exchanges gradients
        if built.quantized:
            widen_norms(built.stage)

    @property
    def engine(self) -> Any:
        return self._engine

    def step(self, micro_batches: Iterator[MicroBatch], row_lengths: Sequence[Sequence[int]], lr: float) -> StepResult:
        """Run one update. Raises NotFiniteError before it if the loss or a gradient is not finite. `row_lengths` has
        the document lengths of each micro-batch.
        """
        self.optimizer.set_rate(lr)
        self.optimizer.begin(len(row_lengths))
        self.loss.losses.clear()
        self.built.stage.expect(row_lengths)
        self._engine.set_train_batch_size(len(row_lengths) * self.processes.layout.dp)
        loss = self._engine.train_batch(sent(micro_batches, self.device))
        return StepResult(loss=float(loss), grad_norm=self.optimizer.grad_norm)

    def evaluate(self, micro_batches: Iterator[MicroBatch], row_lengths: Sequence[Sequence[int]]) -> None:
        """Run the forward pass only; the last stages add to `loss.sums`."""
        self.built.stage.expect(row_lengths)
        self._engine.eval_batch(
            sent(micro_batches, self.device), reduce_output=None, bcast_loss=False, num_micro_batches=len(row_lengths)
        )

    def sums(self) -> list[float]:
        """The objective's sums since the last call, over all replicas; equal on all processes."""
        is_counted = self.processes.is_last_stage and self.processes.tensor.rank == 0
        sums = self.loss.sums if is_counted else torch.zeros_like(self.loss.sums)
        sums = sums.to(self.device)
        dist.all_reduce(sums)
        self.loss.sums = torch.zeros_like(self.loss.sums)
        return [float(number) for number in sums]

    def rows_not_finite(self) -> list[tuple[int, int]]:
        """(replica, micro-batch) of the non-finite losses in this iteration; equal on all processes."""
        mine = []
        if self.processes.is_last_stage and self.processes.tensor.rank == 0:
            mine = [
                (self.processes.replica, m) for m, loss in enumerate(self.loss.losses) if not bool(torch.isfinite(loss))
            ]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        return sorted(row for rows in everyone for row in rows)

    def _votes(self) -> list[Tensor | float]:
        """This process's votes: whether a loss is not finite, and whether a signal asked it to stop."""
        total = torch.stack(self.loss.losses).sum() if self.loss.losses else torch.zeros((), device=self.device)
        return [~torch.isfinite(total), float(self._is_interrupted())]

    def _approve(self, norm: float, votes: Sequence[float]) -> None:
        """Check norm and votes before an update, equally on all processes."""
        bad_losses, interrupted = votes
        self.should_stop = interrupted > 0
        if bad_losses or not math.isfinite(norm):
            raise NotFiniteError


def _trained(built: BuiltStage, processes: Processes) -> Trained:
    return Trained(
        parameters=built.parameters,
        places=built.places,
        outside=tuple(name for name in built.parameters if not name.startswith(f"{built.anatomy.layers}.")),
        tied=built.tied_name,
        is_first_stage=processes.is_first_stage,
        spare=tuple(built.stage.spare),
    )


def _deepspeed_config(dp: int) -> dict[str, Any]:
    """The DeepSpeed configuration, without ZeRO or bf16: our optimizer owns weights and updates."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": dp,
        "gradient_clipping": 0.0,
        "steps_per_print": NEVER,
        "pipeline": {"use_reentrant": False, "pipe_partitioned": False, "grad_partitioned": False},
    }
