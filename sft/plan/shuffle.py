"""The shuffled order of a set of documents, computed for the positions that are asked for.

A Feistel network permutes the numbers of so many bits, whatever its round function; numbers beyond the set are permuted
again until they fall into it. Any position of 100 million takes as long as any other, and no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_ROUNDS = 8
_SMALL = 2**16  # up to here numpy permutes all of them in a millisecond
_U64 = np.uint64


def shuffled(size: int, key: Sequence[int], positions: np.ndarray) -> np.ndarray:
    """What a permutation of `size` numbers, chosen by `key`, has at `positions`."""
    if size <= _SMALL:
        few: np.ndarray = _permutation(size, tuple(key))[positions]
        return few
    bits = (size - 1).bit_length()
    keys = np.random.SeedSequence(tuple(key)).generate_state(_ROUNDS, _U64)
    found = _permuted(positions.astype(_U64), bits, keys)
    outside = np.flatnonzero(found >= size)
    while len(outside):
        found[outside] = _permuted(found[outside], bits, keys)
        outside = outside[found[outside] >= size]
    return found.astype(np.int64)


@lru_cache(maxsize=16)
def _permutation(size: int, key: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(key).permutation(size)


def _permuted(numbers: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """Each half is changed in turn, by an amount that depends only on the other half."""
    width = bits // 2
    high, low = numbers >> _U64(width), numbers & _U64(2**width - 1)
    for number, key in enumerate(keys):
        if number % 2:
            low ^= _mixed(high ^ key) & _U64(2**width - 1)
        else:
            high ^= _mixed(low ^ key) & _U64(2 ** (bits - width) - 1)
    result: np.ndarray = high << _U64(width) | low
    return result


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: each bit of the result depends on all bits."""
    numbers = (numbers ^ numbers >> _U64(30)) * _U64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ numbers >> _U64(27)) * _U64(0x94D049BB133111EB)
    result: np.ndarray = numbers ^ numbers >> _U64(31)
    return result
