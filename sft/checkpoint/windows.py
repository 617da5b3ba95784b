"""Finds the elements that two flat parts of a tensor share, where only a stretch of a part may be available.

A whole tensor that is sliced along `dim` is looked at as rows (all dimensions before `dim`) by columns (the others,
flattened).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor

from sft.model.slices import Slice


@dataclass(frozen=True, kw_only=True)
class Window:
    """A rectangle of the whole, and where it lies in a stretch."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    offset: int  # of its first element in the stretch
    stride: int  # from row to row in the stretch

    @property
    def size(self) -> int:
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])

    @property
    def end(self) -> int:
        """Behind its last element in the stretch."""
        return self.offset + (self.rows[1] - 1 - self.rows[0]) * self.stride + self.columns[1] - self.columns[0]

    def common(self, other: Window) -> Window | None:
        """What `other` has too, placed in this one's stretch."""
        rows, columns = _overlap(self.rows, other.rows), _overlap(self.columns, other.columns)
        if rows is None or columns is None:
            return None
        offset = self.offset + (rows[0] - self.rows[0]) * self.stride + columns[0] - self.columns[0]
        return Window(rows=rows, columns=columns, offset=offset, stride=self.stride)

    def of(self, stretch: Tensor, begin: int = 0) -> Tensor:
        """A view of it in a flat tensor that begins `begin` elements into the stretch."""
        shape = (self.rows[1] - self.rows[0], self.columns[1] - self.columns[0])
        return stretch.as_strided(shape, (self.stride, 1), stretch.storage_offset() + self.offset - begin)


def windows(shape: tuple[int, ...], dim: int, part: Slice | None, start: int, stop: int) -> Iterator[Window]:
    """The rectangles that make the stretch [start, stop) of a flat part of a whole tensor of `shape`; padding is in
    none of them.
    """
    shape = shape or (1,)
    part = part or Slice(dim=dim, pieces=((0, shape[dim]),))
    assert part.dim == dim, (part, dim)
    inner = prod(shape[dim + 1 :])
    width = part.length * inner
    for rows, (left, right) in _bands(start, stop, width):
        for begin, first, last in part.spans(shape[dim]):
            columns = _overlap((left, right), (begin * inner, (begin + last - first) * inner))
            if columns is not None:
                shift = (first - begin) * inner
                offset = rows[0] * width + columns[0] - start
                yield Window(rows=rows, columns=(columns[0] + shift, columns[1] + shift), offset=offset, stride=width)


def _bands(start: int, stop: int, width: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """(rows, columns) of a stretch of a table of `width` columns: the end of a row, whole rows, the beginning of a
    row.
    """
    if start >= stop:
        return
    first, last = start // width, stop // width
    if first == last:
        yield (first, first + 1), (start % width, stop % width)
        return
    if start % width:
        yield (first, first + 1), (start % width, width)
        first += 1
    if first < last:
        yield (first, last), (0, width)
    if stop % width:
        yield (last, last + 1), (0, stop % width)


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int] | None:
    start, stop = max(one[0], other[0]), min(one[1], other[1])
    return (start, stop) if start < stop else None
