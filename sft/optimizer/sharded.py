"""An update from end to end: sums to their owners, the norm, clipping, the owners' update, and the new weights to
everyone.

To DeepSpeed's engine it is an optimizer like any other, which clips for itself. Everything that it knows is in public
methods: `shards` and
`algorithms` hold the states, `publish` makes the model compute with weights that were changed from outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sft.config.optimizer import OptimizerSpec
from sft.model.collectives import TensorGroup
from sft.model.gradients import sum_replicas_of_parts, sum_shared
from sft.model.tensor_parallel import ParameterShard
from sft.optimizer.algorithms.interface import Work, make_algorithms
from sft.optimizer.exchange import PendingExchange, Replicas, begin_reduction, gather_weights
from sft.optimizer.norm import square_sum
from sft.optimizer.ownership import Parcel, num_rows_of, parcels
from sft.optimizer.shards import make_shards, publish
from sft.optimizer.sums import GradientSums


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The trained parameters of a process's stage, by Hugging Face name."""

    parameters: Mapping[str, nn.Parameter]
    places: Mapping[str, ParameterShard]
    outside: Collection[str] = ()  # of the layers: embedding, head and projections next to them
    tied: str | None = None  # the one that is both embedding and head
    is_first_stage: bool = True
    spare: Sequence[nn.Parameter] = ()  # a parameter without effect, if a stage has nothing to train


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The process groups of an optimizer."""

    tensor: TensorGroup
    replicas: Replicas = field(default_factory=Replicas)
    tied: Any = None  # first and last stage, if they share a parameter


class ShardedOptimizer(torch.optim.Optimizer):
    """`votes` are this process's numbers, summed over all; `approve` is given the norm and the sums, and may raise
    before an update.
    """

    def __init__(
        self,
        trained: Trained,
        spec: OptimizerSpec,
        groups: Groups,
        *,
        clip: float,
        device: torch.device,
        votes: Callable[[], Sequence[Tensor | float]] = tuple,
        approve: Callable[[float, Sequence[float]], None] = lambda norm, sums: None,
    ) -> None:
        own = {name: parameter for name, parameter in trained.parameters.items() if parameter.requires_grad}
        super().__init__([{"params": [*own.values(), *trained.spare]}], {"lr": spec.lr})
        self._parameters, self._trained, self._groups, self._clip, self._device = own, trained, groups, clip, device
        self._votes, self._approve = votes, approve
        self._parcels = _parcels_of(own, trained, spec, groups)
        self._begun: list[PendingExchange] = []
        self._complete: set[str] = set()
        self._sums = GradientSums(own, self._note_complete if groups.replicas.size > 1 else None)
        self.on_gradients: Callable[[Mapping[str, tuple[int, Tensor]]], None] | None = (
            None  # (offset, values) before clipping
        )
        self.spec, self.num_steps, self.grad_norm = spec, 0, math.nan
        self._owned = {name: self._rows_of(parcel, name) for parcel in self._parcels for name in parcel.names}
        self.shards = [
            shard
            for name, parameter in own.items()
            for shard in make_shards(name, parameter, trained.places[name], self._owned[name])
        ]
        self.algorithms = make_algorithms(
            Work(spec=spec, shards=self.shards, group=groups.tensor, device=device, outside=trained.outside)
        )

    @property
    def names(self) -> list[str]:
        """Names of all trained parameters of this stage, whoever owns them."""
        return list(self._parameters)

    def set_rate(self, lr: float) -> None:
        for algorithm in self.algorithms:
            for group in algorithm.param_groups:
                group["lr"] = lr

    def begin(self, num_micro_batches: int) -> None:
        """Before an iteration."""
        self._begun.clear()
        self._complete.clear()
        self._sums.begin(num_micro_batches)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update after the gradients of all micro-batches. A collective call."""
        assert closure is None
        gradients = self._completed()
        if self.on_gradients is not None:
            self.on_gradients(
                {
                    name: (self._owned[name].start * _width(self._parameters[name]), grad)
                    for name, grad in gradients.items()
                }
            )
        self.grad_norm = self._agreed_norm(gradients)
        for shard in self.shards:
            begin = shard.offset - self._owned[shard.name].start * _width(shard.parameter)
            shard.weights.grad = gradients[shard.name][begin : begin + shard.weights.numel()].view_as(shard.weights)
        gradients.clear()
        if 0.0 < self._clip < self.grad_norm:
            norm = torch.tensor(self.grad_norm, device=self._device)
            torch.nn.utils.clip_grads_with_norm_([shard.weights for shard in self.shards], self._clip, norm)
        for algorithm in self.algorithms:
            algorithm.step()
        for shard in self.shards:
            shard.weights.grad = None
        self.num_steps += 1
        self.publish()

    def publish(self) -> None:
        """Send the owners' weights to all replicas' models. A collective call."""
        publish(self.shards)
        for parcel in self._parcels:
            gather_weights(parcel, self._parameters, self._groups.replicas)

    def is_first_holder(self, name: str, *, of_all: bool = False) -> bool:
        """Of the ranks of a replica that hold the same, one counts it and writes it to files. `of_all`: of what every
        rank holds.
        """
        if name == self._trained.tied and not self._trained.is_first_stage:
            return False
        part = None if of_all else self._trained.places[name].part
        return part.is_owner if part is not None else self._groups.tensor.rank == 0

    def _rows_of(self, parcel: Parcel, name: str) -> range:
        replicas = self._groups.replicas
        return parcel.rows_of(name, num_rows_of(self._parameters[name].shape), replicas.size, replicas.rank)

    def _note_complete(self, name: str) -> None:
        """In the last micro-batch's backward pass: what is complete goes on its way, in the order that all replicas
        keep.
        """
        self._complete.add(name)
        for parcel in self._parcels[len(self._begun) :]:
            if not self._complete.issuperset(parcel.names) or any(self._is_late(one) for one in parcel.names):
                return
            self._begin(parcel, {one: self._sums.take(one) for one in parcel.names})

    def _begin(self, parcel: Parcel, sums: Mapping[str, Tensor]) -> None:
        self._begun.append(begin_reduction(parcel, sums, self._groups.replicas))

    def _is_late(self, name: str) -> bool:
        """Some tensor ranks, not all, hold this part and a share of its gradient: summed before it is split by rows."""
        return self._groups.tensor.size > 1 and self._trained.places[name].is_replica_of_part

    def _completed(self) -> dict[str, Tensor]:
        """What this replica owns of the gradients, by name, flat: means over replicas, whole where several ranks had
        shares.
        """
        places, tensor = self._trained.places, self._groups.tensor
        late = {name: self._sums.take(name) for name in self._parameters if self._is_late(name)}
        sum_replicas_of_parts(late, places, tensor)
        for parcel in self._parcels[len(self._begun) :]:
            self._begin(
                parcel, {name: late.pop(name) if name in late else self._sums.take(name) for name in parcel.names}
            )
        found: dict[str, Tensor] = {}
        for begun in self._begun:
            found |= begun.finish()
        self._begun.clear()
        sum_shared({name: gradient for name, gradient in found.items() if not self._is_late(name)}, places, tensor)
        if self._trained.tied in found and self._groups.tied is not None:
            dist.all_reduce(found[self._trained.tied], group=self._groups.tied)
        return found

    def _agreed_norm(self, gradients: Mapping[str, Tensor]) -> float:
        """The gradient norm, with every weight counted once. The only synchronisation with the device in an
        iteration.
        """
        counted = [gradient for name, gradient in gradients.items() if self.is_first_holder(name)]
        square = square_sum(counted, self._device)
        votes = [torch.as_tensor(vote, dtype=torch.float64).to(self._device) for vote in self._votes()]
        sums = torch.stack([square, *votes])
        dist.all_reduce(sums)
        total, *rest = sums.tolist()
        norm = math.sqrt(total) if total >= 0 else math.nan
        self._approve(norm, rest)
        return norm


def _width(parameter: Tensor) -> int:
    return math.prod(parameter.shape[1:])


def _parcels_of(own: Mapping[str, nn.Parameter], trained: Trained, spec: OptimizerSpec, groups: Groups) -> list[Parcel]:
    shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
    whole: set[str] = set()
    if spec.kind.needs_whole_matrices:
        whole = (
            set(shapes)
            if spec.kind.is_factored
            else {name for name, shape in shapes.items() if len(shape) > 1} - set(trained.outside)
        )
    late = {name for name in shapes if groups.tensor.size > 1 and trained.places[name].is_replica_of_part}
    return parcels(
        shapes,
        groups.replicas.size,
        whole=whole,
        shared={trained.tied} & shapes.keys() if trained.tied else (),
        last=late,
    )
