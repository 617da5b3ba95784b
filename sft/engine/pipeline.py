"""DeepSpeed's pipeline engine around a stage. What we rely on in DeepSpeed is named in this file, and in `start` and `groups`."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, nn

from sft.engine.feed import MicroBatch
from sft.engine.groups import Processes
from sft.engine.optimizers import OptimizerSettings, make_optimizer
from sft.model.build import BuiltStage
from sft.model.gradients import sum_partial
from sft.model.quantized import widen_norms
from sft.model.stage import Loss
from sft.plan.memory import bucket_elements

NEVER = 10**9


class NotFiniteError(Exception):
    """A loss or a gradient is not a number. Raised on every process, before anything was updated."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    loss: float
    grad_norm: float


class _OneStagePipeline(PipelineModule):  # type: ignore[misc]  # DeepSpeed has no types
    """A pipeline whose only local layer is the whole stage, so that where to cut stays with us."""

    def __init__(self, stage: nn.Module, processes: Processes, loss: Loss) -> None:
        layers: list[Any] = [LayerSpec(nn.Identity) for _ in range(processes.layout.pp)]
        layers[processes.stage] = stage
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the topology
            super().__init__(
                layers=layers, topology=processes.topology, loss_fn=loss, partition_method="uniform", dynamic_shape=True
            )  # fmt: skip
        self.before_reduction: Any = None

    def get_tied_weights_and_groups(self) -> list[Any]:
        """DeepSpeed calls this on every stage once an iteration, when gradients are complete and not yet averaged over replicas."""
        if self.before_reduction is not None:
            self.before_reduction()
        return []


class Pipeline:
    """One process's part in training: iterations and validations are collective calls."""

    def __init__(
        self, built: BuiltStage, processes: Processes, *, optimizer: OptimizerSettings, clip: float, dtype: torch.dtype,
        device: torch.device, vocabulary_size: int, is_interrupted: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.built, self.processes, self.device = built, processes, device
        self._is_interrupted = is_interrupted
        self.on_gradients: Callable[[Mapping[str, Tensor]], None] | None = None  # sees them when they are complete, before they are clipped
        self.should_stop = False  # a signal has reached some process; the same on every one, after a step
        self.loss = Loss(built.stage, vocabulary_size, processes.tensor)
        module = _OneStagePipeline(built.stage, processes, self.loss)
        module.before_reduction = self._complete_gradients
        if not processes.is_first_stage and built.tied_name in built.parameters:
            built.parameters[built.tied_name].ds_pipe_replicated = True  # type: ignore[attr-defined]  # the norm counts it once
        spare = {f"spare.{number}": parameter for number, parameter in enumerate(built.stage.spare)}
        self._optimizer = make_optimizer({**built.parameters, **spare}, optimizer, device)
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=self._optimizer, config=_deepspeed_config(processes.layout.dp, clip, dtype),
                dist_init_required=False,
            )  # fmt: skip
        if built.quantized:
            widen_norms(built.stage)

    @property
    def engine(self) -> Any:
        return self._engine

    def step(self, micro_batches: Iterator[MicroBatch], num_micro_batches: int, lr: float) -> StepResult:
        """One update. Raises NotFiniteError before it where the loss or a gradient is not a number."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self.loss.losses.clear()
        self._engine.set_train_batch_size(num_micro_batches * self.processes.layout.dp)
        loss = self._engine.train_batch(micro_batches)
        norm = self._engine.get_global_grad_norm()
        return StepResult(loss=float(loss), grad_norm=float(norm))

    def evaluate(self, micro_batches: Iterator[MicroBatch], num_micro_batches: int) -> None:
        """Forward only: the last stages add to `loss.counts`."""
        self._engine.eval_batch(micro_batches, reduce_output=None, bcast_loss=False, num_micro_batches=num_micro_batches)

    def counts(self) -> list[float]:
        """[weighted nll, weight, tokens predicted right, tokens] over all replicas, since the last call; the same on every process."""
        counts = (
            self.loss.counts if self.processes.is_last_stage and self.processes.tensor.rank == 0 else torch.zeros_like(self.loss.counts)
        )
        counts = counts.to(self.device)
        dist.all_reduce(counts)
        self.loss.counts = torch.zeros_like(self.loss.counts)
        return [float(count) for count in counts]

    def rows_not_finite(self) -> list[tuple[int, int]]:
        """(replica, micro-batch) of the losses that are not a number in this iteration; the same on every process."""
        mine = []
        if self.processes.is_last_stage and self.processes.tensor.rank == 0:
            mine = [(self.processes.replica, m) for m, loss in enumerate(self.loss.losses) if not bool(torch.isfinite(loss))]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        return sorted(row for rows in everyone for row in rows)

    def _complete_gradients(self) -> None:
        """Sum what ranks hold parts of; then stop on all processes where something is not a number, and agree on signals."""
        gradients = {name: self._gradient(parameter) for name, parameter in self.built.parameters.items() if parameter.requires_grad}
        sum_partial(gradients, self.built.places, self.processes.tensor)
        tied = self.built.tied_name
        if tied in gradients and self.processes.tied is not None:
            dist.all_reduce(gradients[tied], group=self.processes.tied)
        if self.on_gradients is not None:
            self.on_gradients(gradients)
        total = torch.nn.utils.get_total_norm(list(gradients.values()))
        is_bad = ~torch.isfinite(total.to(self.device))
        if self.loss.losses:
            is_bad |= ~torch.isfinite(torch.stack(self.loss.losses).sum())
        flags = torch.stack([is_bad, torch.tensor(self._is_interrupted(), device=self.device)]).to(torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        found_bad, self.should_stop = (bool(flag) for flag in flags.tolist())
        if found_bad:
            raise NotFiniteError

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        """Where this engine gathers a parameter's gradient over micro-batches."""
        gradient = parameter._hp_grad if self._engine.using_bf16_optimizer else parameter.grad  # type: ignore[attr-defined]
        assert isinstance(gradient, Tensor), "a parameter of this stage got no gradient"
        return gradient


def _deepspeed_config(dp: int, clip: float, dtype: torch.dtype) -> dict[str, Any]:
    """ZeRO-1 always: without it the clipping norm is wrong with pipelines. Gradients are summed in float32."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "train_batch_size": dp, "gradient_clipping": clip,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": bucket_elements(dp)}, "zero_allow_untested_optimizer": True,
        "steps_per_print": NEVER,
        "pipeline": {"use_reentrant": False, "pipe_partitioned": False, "grad_partitioned": False},
    }  # fmt: skip
    if dtype is torch.bfloat16:
        # The loss is computed outside the module, so DeepSpeed's prologue of the backward pass comes after the gradients of head and norm,
        # and would clear them: they are added to the float32 sums at once instead. Those are reduced as they are, in float32.
        config |= {
            "bf16": {"enabled": True, "immediate_grad_update": True}, "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }  # fmt: skip
    return config
