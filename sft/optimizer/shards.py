"""A shard: the rows of one parameter that this replica updates, as float32 weights for a torch optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sft.model.collectives import TensorGroup
from sft.model.tensor_parallel import ParameterShard

_MOST_ELEMENTS = 2**30  # bitsandbytes counts in 32 bits


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """`weights` share memory with a float32 parameter; otherwise they are the master copy."""

    name: str
    parameter: nn.Parameter
    place: ParameterShard
    rows: range
    weights: nn.Parameter

    @property
    def offset(self) -> int:
        """Index of its first weight in this rank's flattened part of the parameter."""
        return self.rows.start * (self.parameter[:1].numel() if self.parameter.dim() else 1)

    @property
    def is_matrix(self) -> bool:
        return self.parameter.dim() > 1

    @property
    def is_master(self) -> bool:
        return self.parameter.dtype is not torch.float32


@torch.no_grad()
def publish(shards: Sequence[Shard]) -> None:
    """Copy the master weights to the parameters, rounded to their dtype."""
    masters = [shard for shard in shards if shard.is_master]
    if masters:
        copy_all(
            [_rows(shard.parameter.data, shard.rows) for shard in masters], [shard.weights.data for shard in masters]
        )


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy all sources to their targets, in a few launches on a GPU. The function is private to torch."""
    torch._foreach_copy_(targets, sources)


def make_shards(
    name: str, parameter: nn.Parameter, place: ParameterShard, rows: range, most: int = _MOST_ELEMENTS
) -> list[Shard]:
    """Return shards of at most `most` elements (but at least one row) that cover the rows this replica owns."""
    at_once = max(1, most // max(1, parameter[:1].numel() if parameter.dim() else 1))
    starts = range(rows.start, rows.stop, at_once)
    return [_make_shard(name, parameter, place, range(start, min(start + at_once, rows.stop))) for start in starts]


def _make_shard(name: str, parameter: nn.Parameter, place: ParameterShard, rows: range) -> Shard:
    own = _rows(parameter.data, rows)
    weights = nn.Parameter(own if parameter.dtype is torch.float32 else own.float())
    return Shard(name=name, parameter=parameter, place=place, rows=rows, weights=weights)


def _rows(tensor: Tensor, rows: range) -> Tensor:
    return tensor[rows.start : rows.stop] if tensor.dim() else tensor


def whole_of(part: Tensor, place: ParameterShard, group: TensorGroup) -> Tensor:
    """Assemble on every tensor rank the whole tensor from the ranks' parts. Adding zeros changes no bit."""
    if place.part is None:
        return part
    whole = part.new_zeros(place.shape)
    if place.part.is_owner:
        place.part.put(whole, part)
    return group.sum(whole)


def part_of(whole: Tensor, place: ParameterShard) -> Tensor:
    return whole if place.part is None else place.part.take(whole)
