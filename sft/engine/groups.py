"""The process groups of a run: tensor-parallel ranks, pipeline stages, data-parallel replicas."""

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
    """Move the first dimension back to its place in a new tensor, without a copy if the dimensions before it have size
    1.
    """
    shape = first.movedim(0, dim).shape
    position = dim % first.dim()
    if all(size == 1 for size in shape[:position]):
        own: Tensor = first.new_empty(0)
        strides = tuple(math.prod(shape[position:]) for position in range(1, len(shape) + 1))
        return own.set_(first.untyped_storage(), 0, shape, strides)  # not a view: layers may modify it in place
    return first.movedim(0, dim).contiguous()


class Communicators:
    """One group per distinct set of ranks: on GPUs each has half a GB of buffers. All calls are collective."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], Any] = {tuple(range(dist.get_world_size())): dist.group.WORLD}

    def of(self, ranks: Iterable[int]) -> Any:
        """The group of these ranks, created on first use. All processes must ask for the same sets in the same
        order.
        """
        wanted = tuple(sorted(set(ranks)))
        if wanted not in self._made:
            self._made[wanted] = dist.new_group(list(wanted))
        return self._made[wanted]

    @property
    def own(self) -> list[tuple[int, ...]]:
        """The sets of ranks that contain this process."""
        rank = dist.get_rank()
        return [ranks for ranks in self._made if rank in ranks]

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Lend our groups to DeepSpeed inside this block. It creates groups per purpose, duplicates included (0.19)."""
        from deepspeed import comm

        new_group, comm.new_group = comm.new_group, self.of
        try:
            yield
        finally:
            comm.new_group = new_group


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process's position in the run, and its groups."""

    layout: Layout
    rank: int
    stage: int
    replica: int
    tensor: TensorGroup
    topology: Any  # DeepSpeed's
    tied: Any  # group of the first and last stage that share an embedding with this process; None in other stages
    replicas: Replicas  # the processes with the same weights
    communicators: Communicators

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.layout.pp - 1


def form_groups(layout: Layout) -> Processes:
    """Create the groups, in the same order on every process. A collective call."""
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
