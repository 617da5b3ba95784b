"""Which part of a whole tensor a tensor-parallel rank holds, and how that part is taken out of the whole and put back.

The pieces may reach past the end of the whole. What lies there is padding: zeros on the way in, dropped on the way out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Which part of a whole tensor a tensor-parallel rank holds: `pieces` of dimension `dim`, one behind the other."""

    dim: int
    pieces: tuple[tuple[int, int], ...]  # [start, stop) in the whole
    is_owner: bool = True  # of several ranks that hold the same piece (replicated key-value heads), the first

    def __post_init__(self) -> None:
        assert self.dim >= 0, self
        assert all(0 <= start <= stop for start, stop in self.pieces), self

    @property
    def length(self) -> int:
        """Of the part, along `dim`, padding included."""
        return sum(stop - start for start, stop in self.pieces)

    def shape_of(self, whole_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The part's shape."""
        return (*whole_shape[: self.dim], self.length, *whole_shape[self.dim + 1 :])

    def spans(self, whole_length: int) -> Iterator[tuple[int, int, int]]:
        """(where it begins in the part, start, stop in the whole) of each piece, without padding and without empty
        pieces.
        """
        begin = 0
        for start, stop in self.pieces:
            if (inner := min(stop, whole_length)) > start:
                yield begin, start, inner
            begin += stop - start

    def take(self, whole: Tensor) -> Tensor:
        """A contiguous copy of the part, zero where it reaches past the whole."""
        part = torch.zeros(self.shape_of(tuple(whole.shape)), dtype=whole.dtype, device=whole.device)
        for begin, start, stop in self.spans(whole.size(self.dim)):
            part.narrow(self.dim, begin, stop - start).copy_(whole.narrow(self.dim, start, stop - start))
        return part

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Write the part into its place in the whole, padding left out."""
        assert tuple(part.shape) == self.shape_of(tuple(whole.shape)), (self, part.shape, whole.shape)
        for begin, start, stop in self.spans(whole.size(self.dim)):
            whole.narrow(self.dim, start, stop - start).copy_(part.narrow(self.dim, begin, stop - start))
