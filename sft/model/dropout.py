"""Dropout before adapters that is the same on every layout: what is dropped follows from document, position, layer and
feature alone.

There is no random state. A document's key comes with its positions, in their upper bits; each value is hashed from key,
position, layer and feature. So it does not matter which rank computes it, in which row it lies, or how often it is
computed again: nothing of it is kept for the backward pass, and only some tokens' hashes are there at once.

T are tokens, E (or I) features of a layer's input, R the adapter's rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from sft.model import matmul
from sft.model.slices import Slice

KEY_BITS = 31
_SHIFT, _LOW = 32, 0xFFFFFFFF
_MIX = ((0x9E3779B1, 15), (0x85EBCA77, 13), (0xC2B2AE3D, 16))
_HASHES_AT_ONCE = 2**22  # 4 bytes each, and about the same again temporarily


class Keys:
    """The keys of the current row. Blocks set them, so that they are right in recomputation."""

    def __init__(self) -> None:
        self.current_T: Tensor | None = None


class AdapterDropout:
    """Dropout for one layer's adapter. `part` says which inputs of the layer this rank has."""

    def __init__(
        self, keys: Keys, name: str, share: float, num_features: int, part: Slice | None, stretch: tuple[int, int]
    ) -> None:
        assert 0 < share < 1, share
        self._keys, self._share = keys, share
        self._threshold = int(share * 2**32) - 2**31  # as a signed number
        self._stretch = stretch  # (rank, ranks): the slice of tokens, for a layer that does not see all of them
        features = torch.arange(num_features)
        if part is not None:
            features = torch.cat([torch.arange(start, stop) for start, stop in part.pieces])
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        self._features_E = _signed(_hashed(_hashed(features) ^ seed))

    def low(self, hidden_TI: Tensor, a_RI: Tensor) -> Tensor:
        """Return low_TR: A times the inputs after dropout."""
        function: Any = _DroppedProduct
        low_TR: Tensor = function.apply(hidden_TI, a_RI, self, self.keys_of(hidden_TI))
        return low_TR

    def keys_of(self, hidden_TE: Tensor) -> Tensor:
        """The keys of the tokens that this layer sees, copied before the row changes."""
        keys_T = self._keys.current_T
        assert keys_T is not None, "a row without keys"
        if keys_T.numel() != hidden_TE.size(-2):
            rank, ranks = self._stretch
            keys_T = keys_T.chunk(ranks)[rank]
        if self._features_E.device != hidden_TE.device:
            self._features_E = self._features_E.to(hidden_TE.device)
        return _signed(keys_T)

    def in_chunks(self, keys_T: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield (a slice of tokens, factors_CE): 0 for dropped inputs, the scale for the others."""
        at_once = max(1, _HASHES_AT_ONCE // max(1, self._features_E.numel()))
        for start in range(0, keys_T.numel(), at_once):
            tokens = slice(start, start + at_once)
            values = keys_T[tokens, None] ^ self._features_E
            for factor, shift in _MIX:
                values.mul_(factor - 2**32 if factor >= 2**31 else factor)  # overflow is cut off
                values ^= (values >> shift) & ((1 << (32 - shift)) - 1)  # without the sign
            kept_CE = (values ^ -(2**31)) >= self._threshold
            yield tokens, kept_CE.to(dtype) / (1 - self._share)


class _DroppedProduct(Function):
    """Keeps the layer's input for the backward pass, which other layers keep too, instead of a dropped copy."""

    @staticmethod
    def forward(context: Any, hidden_TI: Tensor, a_RI: Tensor, dropout: AdapterDropout, keys_T: Tensor) -> Tensor:
        context.save_for_backward(hidden_TI, a_RI, keys_T)
        context.dropout = dropout
        low_TR = hidden_TI.new_empty(hidden_TI.size(0), a_RI.size(0))
        for tokens, factors_CI in dropout.in_chunks(keys_T, hidden_TI.dtype):
            low_TR[tokens] = matmul.multiply(factors_CI.mul_(hidden_TI[tokens]), a_RI.t())
        return low_TR

    @staticmethod
    def backward(context: Any, gradient_TR: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        hidden_TI, a_RI, keys_T = context.saved_tensors
        gradient_TI = torch.empty_like(hidden_TI) if context.needs_input_grad[0] else None
        sum_RI = torch.zeros_like(a_RI, dtype=torch.float32)
        for tokens, factors_CI in context.dropout.in_chunks(keys_T, hidden_TI.dtype):
            sum_RI += matmul.multiply(gradient_TR[tokens].t(), factors_CI * hidden_TI[tokens])
            if gradient_TI is not None:
                torch.mul(matmul.multiply(gradient_TR[tokens], a_RI), factors_CI, out=gradient_TI[tokens])
        return gradient_TI, sum_RI.to(a_RI.dtype), None, None


def decoded(coded_RT: Tensor) -> tuple[Tensor, Tensor]:
    """Split positions that carry document keys into (positions_RT, keys_T)."""
    positions_RT = coded_RT & _LOW
    return positions_RT, _hashed(_hashed(coded_RT[0] >> _SHIFT) ^ positions_RT[0])


def document_keys(batch: bytes, count: int) -> list[int]:
    """A key for each document of an iteration, derived from what identifies the iteration."""
    digest = hashlib.sha256(batch).digest()
    return [
        int.from_bytes(hashlib.sha256(digest + number.to_bytes(8, "big")).digest()[:4], "big") >> 1
        for number in range(count)
    ]


def _hashed(values: Tensor) -> Tensor:
    """Hash 32 bits to 32 bits, in int64: overflowing products keep their lower bits, which are all that is used."""
    for factor, shift in _MIX:
        values = (values * factor) & _LOW
        values = values ^ (values >> shift)
    return values


def _signed(values: Tensor) -> Tensor:
    """The same bits as a signed 32-bit number."""
    return (((values & _LOW) + 2**31) & _LOW).sub_(2**31).to(torch.int32)
