"""Order statistics of very many numbers in constant memory: the numbers are in a file and counted by their first bits;
only those with the same first bits are compared.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from tokenize_data.files import scratch_file

_FIRST_BITS = 16
_SHIFT = np.uint64(64 - _FIRST_BITS)
_STRETCH = 1 << 20


class Drawn:
    """Evenly spread 64-bit numbers. Use it in a `with` statement, which removes the file."""

    def __init__(self, folder: Path) -> None:
        self._file = scratch_file(folder)
        self._counts = np.zeros(1 << _FIRST_BITS, np.int64)
        self._least, self._most = 2**64, -1

    def __enter__(self) -> Drawn:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return int(self._counts.sum())

    @property
    def are_equal(self) -> bool:
        return self._least == self._most

    def add(self, numbers: np.ndarray) -> None:
        if len(numbers):
            self._file.write(np.ascontiguousarray(numbers, np.uint64).data)
            self._counts += np.bincount((numbers >> _SHIFT).astype(np.int64), minlength=len(self._counts))
            self._least = min(self._least, int(numbers.min()))
            self._most = max(self._most, int(numbers.max()))

    def smallest(self, count: int) -> int:
        """The `count`-th smallest number."""
        through = np.cumsum(self._counts)
        first = int(np.searchsorted(through, count))
        numbers, counts = self._with_first_bits(first)
        before = int(through[first] - self._counts[first])
        return int(numbers[np.searchsorted(np.cumsum(counts) + before, count)])

    def smallest_groups(self, count: int) -> int:
        """The largest number up to which there are at most `count`, equal ones included; at least the smallest one.
        There must be more than `count` numbers.
        """
        through = np.cumsum(self._counts)
        first = int(np.searchsorted(through, count, side="right"))
        numbers, counts = self._with_first_bits(first)
        fitting = int(np.searchsorted(np.cumsum(counts) + through[first] - self._counts[first], count, side="right"))
        if fitting:
            return int(numbers[fitting - 1])
        earlier = np.flatnonzero(self._counts[:first])
        return int(self._with_first_bits(int(earlier[-1]))[0][-1]) if len(earlier) else int(numbers[0])

    def _with_first_bits(self, bits: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (distinct numbers with these first bits, sorted; their counts)."""
        numbers, counts = np.empty(0, np.uint64), np.empty(0, np.int64)
        for stretch in self._stretches():
            mine, times = np.unique(stretch[stretch >> _SHIFT == bits], return_counts=True)
            both, at = np.unique(np.concatenate([numbers, mine]), return_inverse=True)
            added = np.zeros(len(both), np.int64)
            np.add.at(added, at, np.concatenate([counts, times]))
            numbers, counts = both, added
        return numbers, counts

    def _stretches(self) -> Iterator[np.ndarray]:
        self._file.flush()
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            for at in range(0, len(self) * 8, _STRETCH * 8):
                yield np.frombuffer(mapped[at : at + _STRETCH * 8], np.uint64)
