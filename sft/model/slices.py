"""The part of a tensor that a tensor-parallel rank holds, how to take it from the whole tensor and put it back. Pieces
may extend past the end of the whole. That padding is zero when taken, and dropped when put back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A tensor-parallel rank's part of a tensor: concatenated `pieces` of dimension `dim`."""

    dim: int
    pieces: tuple[tuple[int, int], ...]  # [start, stop) in the whole
    is_owner: bool = True  # whether this is the first rank that holds these pieces (replicated key-value heads)

    def __post_init__(self) -> None:
        assert self.dim >= 0, self
        assert all(0 <= start <= stop for start, stop in self.pieces), self

    @property
    def length(self) -> int:
        """The part's length along `dim`, including padding."""
        return sum(stop - start for start, stop in self.pieces)

    def shape_of(self, whole_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The part's shape."""
        return (*whole_shape[: self.dim], self.length, *whole_shape[self.dim + 1 :])

    def spans(self, whole_length: int) -> Iterator[tuple[int, int, int]]:
        """(offset in the part, start, stop in the whole) of each piece, without padding and empty pieces."""
        begin = 0
        for start, stop in self.pieces:
            if (inner := min(stop, whole_length)) > start:
                yield begin, start, inner
            begin += stop - start

    def take(self, whole: Tensor) -> Tensor:
        """A contiguous copy of the part, with zeros as padding."""
        part = torch.zeros(self.shape_of(tuple(whole.shape)), dtype=whole.dtype, device=whole.device)
        for begin, start, stop in self.spans(whole.size(self.dim)):
            part.narrow(self.dim, begin, stop - start).copy_(whole.narrow(self.dim, start, stop - start))
        return part

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Write the part into the whole, without padding."""
        assert tuple(part.shape) == self.shape_of(tuple(whole.shape)), (self, part.shape, whole.shape)
        for begin, start, stop in self.spans(whole.size(self.dim)):
            whole.narrow(self.dim, start, stop - start).copy_(part.narrow(self.dim, begin, stop - start))
