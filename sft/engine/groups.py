"""The processes of a run: who shares tensors, who is in which pipeline stage, who has which share of the data."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from sft.model.collectives import SingleRank, TensorGroup
from sft.optimizer.exchange import ALL_GATHER, REDUCE_SCATTER, Replicas
from sft.plan.layout import Layout


class ProcessGroup:
    """A tensor-parallel group of several processes."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def sum(self, tensor: Tensor) -> Tensor:
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def maximum(self, tensor: Tensor) -> Tensor:
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        first = tensor.movedim(dim, 0).contiguous()
        whole = first.new_empty((first.size(0) * self.size, *first.shape[1:]))
        ALL_GATHER(whole, first, group=self._group)
        return _moved_back(whole, dim)

    def sum_scatter(self, tensor: Tensor, dim: int) -> Tensor:
        first = tensor.movedim(dim, 0).contiguous()
        own = first.new_empty((first.size(0) // self.size, *first.shape[1:]))
        REDUCE_SCATTER(own, first, group=self._group)
        return _moved_back(own, dim)

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        result = tensor.contiguous().clone()
        dist.all_reduce(result, operation, group=self._group)
        return result


def _moved_back(first: Tensor, dim: int) -> Tensor:
    """The first dimension back to its place, as a tensor of its own. Without a copy where the dimensions before it are
    1: a row is one.
    """
    shape = first.movedim(0, dim).shape
    position = dim % first.dim()
    if all(size == 1 for size in shape[:position]):
        own: Tensor = first.new_empty(0)
        strides = tuple(math.prod(shape[position:]) for position in range(1, len(shape) + 1))
        return own.set_(first.untyped_storage(), 0, shape, strides)  # not a view: layers may change it in place
    return first.movedim(0, dim).contiguous()


class Communicators:
    """One group for each distinct set of ranks: on GPUs each has buffers of its own, half a GB of them. All calls are
    collective.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], Any] = {tuple(range(dist.get_world_size())): dist.group.WORLD}

    def of(self, ranks: Iterable[int]) -> Any:
        """The group of these ranks, formed where there is none yet. Every process asks for the same sets in the same
        order.
        """
        wanted = tuple(sorted(set(ranks)))
        if wanted not in self._made:
            self._made[wanted] = dist.new_group(list(wanted))
        return self._made[wanted]

    @property
    def own(self) -> list[tuple[int, ...]]:
        """The sets that this process is in."""
        rank = dist.get_rank()
        return [ranks for ranks in self._made if rank in ranks]

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """DeepSpeed forms groups for each purpose, and again those that there are (0.19): for this while it is given
        ours.
        """
        from deepspeed import comm

        new_group, comm.new_group = comm.new_group, self.of
        try:
            yield
        finally:
            comm.new_group = new_group


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those of the run, and the groups it belongs to."""

    layout: Layout
    rank: int
    stage: int
    replica: int
    tensor: TensorGroup
    topology: Any  # DeepSpeed's
    tied: Any  # the group of first and last stage that share an embedding with this process; None in stages between
    replicas: Replicas  # the processes that hold the same weights
    communicators: Communicators

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.layout.pp - 1


def form_groups(layout: Layout) -> Processes:
    """A collective call: every process forms the same groups in the same order."""
    from deepspeed.runtime.pipe.topology import ProcessTopology

    rank = dist.get_rank()
    topology = ProcessTopology(axes=["data", "pipe", "model"], dims=[layout.dp, layout.pp, layout.tp])
    coordinates = topology.get_coord(rank)
    communicators = Communicators()
    tensor: TensorGroup = SingleRank()
    for ranks in topology.get_axis_comm_lists("model") if layout.tp > 1 else ():
        group = communicators.of(ranks)
        if rank in ranks:
            tensor = ProcessGroup(group)
    tied = None
    for ranks in topology.get_axis_comm_lists("pipe") if layout.pp > 1 else ():
        ends = [ranks[0], ranks[-1]]
        group = communicators.of(ends)
        if rank in ends:
            tied = group
    replicas = Replicas()
    for ranks in topology.get_axis_comm_lists("data") if layout.dp > 1 else ():
        group = communicators.of(ranks)
        if rank in ranks:
            replicas = Replicas(size=layout.dp, rank=coordinates.data, group=group)
    return Processes(
        layout=layout,
        rank=rank,
        stage=coordinates.pipe,
        replica=coordinates.data,
        tensor=tensor,
        topology=topology,
        tied=tied,
        replicas=replicas,
        communicators=communicators,
    )
