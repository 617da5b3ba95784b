"""Dropout before adapters that is the same on every layout: what is dropped follows from document, position, layer and feature alone.

There is no random state. A document's key comes with its positions, in their upper bits; each value is hashed from key, position, layer and
feature. So it does not matter which rank computes it, in which row it lies, or how often it is computed again.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from sft.model.slices import Slice

KEY_BITS = 31
_SHIFT, _LOW = 32, 0xFFFFFFFF
_MIX = ((0x9E3779B1, 15), (0x85EBCA77, 13), (0xC2B2AE3D, 16))


class Keys:
    """Of the row that is computed now. Blocks set it, so that it is right when they are computed again."""

    def __init__(self) -> None:
        self.current_T: Tensor | None = None


class AdapterDropout:
    """For one layer's adapter. `part` says which of the layer's inputs this rank has."""

    def __init__(self, keys: Keys, name: str, share: float, num_features: int, part: Slice | None, stretch: tuple[int, int]) -> None:
        assert 0 < share < 1, share
        self._keys, self._share = keys, share
        self._threshold = int(share * 2**32)
        self._stretch = stretch  # (rank, ranks): which stretch of the tokens a layer sees that does not see them all
        features = torch.arange(num_features)
        if part is not None:
            features = torch.cat([torch.arange(start, stop) for start, stop in part.pieces])
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        self._features_E = _hashed(_hashed(features) ^ seed)

    def __call__(self, hidden: Tensor) -> Tensor:
        keys_T = self._keys.current_T
        assert keys_T is not None, "a row without keys"
        if keys_T.numel() != hidden.size(-2):
            rank, ranks = self._stretch
            keys_T = keys_T.chunk(ranks)[rank]
        if self._features_E.device != hidden.device:
            self._features_E = self._features_E.to(hidden.device)
        kept_TE = _hashed(keys_T[:, None] ^ self._features_E) >= self._threshold
        return hidden * (kept_TE.to(hidden.dtype) / (1 - self._share))


def decoded(coded_RT: Tensor) -> tuple[Tensor, Tensor]:
    """(positions_RT, keys_T) of positions that came with their documents' keys."""
    positions_RT = coded_RT & _LOW
    return positions_RT, _hashed(_hashed(coded_RT[0] >> _SHIFT) ^ positions_RT[0])


def document_keys(batch: bytes, count: int) -> list[int]:
    """A key for each document of an iteration, from what identifies the iteration."""
    digest = hashlib.sha256(batch).digest()
    return [int.from_bytes(hashlib.sha256(digest + number.to_bytes(8, "big")).digest()[:4], "big") >> 1 for number in range(count)]


def _hashed(values: Tensor) -> Tensor:
    """32 bits in, 32 bits out, in int64: products that overflow keep their lower bits, which is all that is looked at."""
    for factor, shift in _MIX:
        values = (values * factor) & _LOW
        values = values ^ (values >> shift)
    return values
