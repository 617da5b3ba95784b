"""Exchanges between replicas: float32 gradient sums go to their owners, new weights come back in their own dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from sft.optimizer.ownership import Parcel, num_rows_of

# torch 2.13 renamed both.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """The processes that hold the same weights. `group` is None for a single one."""

    size: int = 1
    rank: int = 0
    group: Any = None


@dataclass(frozen=True)
class PendingExchange:
    """A started exchange. `finish` waits for it and returns what this replica owns, by name, flat."""

    finish: Callable[[], dict[str, Tensor]]


def begin_reduction(parcel: Parcel, sums: Mapping[str, Tensor], replicas: Replicas) -> PendingExchange:
    """Start sending means over replicas to their owners, as flat tensors of the rows that each one owns."""
    if replicas.size == 1:
        return PendingExchange(lambda: {name: tensor.reshape(-1) for name, tensor in sums.items()})
    sent, lengths = _laid_out(parcel, sums, replicas)
    received = sent.new_empty(sent.numel() // replicas.size)
    work = REDUCE_SCATTER(received, sent, group=replicas.group, async_op=True)

    def finish(kept: Tensor | None = sent) -> dict[str, Tensor]:
        work.wait()
        received.div_(replicas.size)
        own = [(name, length) for name, length in lengths if length]
        return dict(
            zip([name for name, _ in own], received[: sum(n for _, n in own)].split([n for _, n in own]), strict=True)
        )

    return PendingExchange(finish)


def gather_weights(parcel: Parcel, parameters: Mapping[str, nn.Parameter], replicas: Replicas) -> None:
    """Send each replica's own rows of the parameters to all others."""
    if replicas.size == 1:
        return
    data = {name: parameters[name].data for name in parcel.names}
    first = next(iter(data.values()))
    segment = _segment(parcel, data, replicas)
    own = first.new_zeros(segment)
    begin = 0
    for name, tensor in data.items():
        rows = _flat_rows(parcel, name, tensor, replicas, replicas.rank)
        own[begin : begin + len(rows)] = tensor.view(-1)[rows.start : rows.stop]
        begin += len(rows)
    everything = first.new_empty(replicas.size * segment)
    ALL_GATHER(everything, own, group=replicas.group)
    for replica, given in enumerate(everything.split(segment)):
        begin = 0
        for name, tensor in data.items():
            rows = _flat_rows(parcel, name, tensor, replicas, replica)
            if replica != replicas.rank:
                tensor.view(-1)[rows.start : rows.stop] = given[begin : begin + len(rows)]
            begin += len(rows)


def _laid_out(
    parcel: Parcel, tensors: Mapping[str, Tensor], replicas: Replicas
) -> tuple[Tensor, list[tuple[str, int]]]:
    """(one segment for each replica, one behind the other; how much of each tensor is this replica's). No copy where
    rows divide evenly.
    """
    lengths = [
        (name, len(_flat_rows(parcel, name, tensor, replicas, replicas.rank))) for name, tensor in tensors.items()
    ]
    segment = _segment(parcel, tensors, replicas)
    first = next(iter(tensors.values()))
    if parcel.owners is None and first.numel() == segment * replicas.size:
        return first.contiguous().view(-1), lengths
    sent = first.new_zeros(replicas.size * segment)
    for replica in range(replicas.size):
        begin = replica * segment
        for name, tensor in tensors.items():
            rows = _flat_rows(parcel, name, tensor, replicas, replica)
            sent[begin : begin + len(rows)] = tensor.reshape(-1)[rows.start : rows.stop]
            begin += len(rows)
    return sent, lengths


def _segment(parcel: Parcel, tensors: Mapping[str, Tensor], replicas: Replicas) -> int:
    """The size of the largest share of a parcel."""
    return max(
        sum(len(_flat_rows(parcel, name, tensor, replicas, replica)) for name, tensor in tensors.items())
        for replica in range(replicas.size)
    )


def _flat_rows(parcel: Parcel, name: str, tensor: Tensor, replicas: Replicas, replica: int) -> range:
    num_rows = num_rows_of(tensor.shape)
    rows = parcel.rows_of(name, num_rows, replicas.size, replica)
    width = math.prod(tensor.shape[1:])
    return range(rows.start * width, rows.stop * width)
