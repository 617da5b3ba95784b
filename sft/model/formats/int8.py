"""Integers of 8 bits with a scale for each row, as bitsandbytes stores them; activations stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST = 127


@dataclass(frozen=True)
class _Rows:
    values: Tensor
    scales: Tensor
    dtype: torch.dtype

    def whole(self) -> Tensor:
        return (self.values.float() * self.scales).to(self.dtype)

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.values, self.scales)


class _Int8:
    def check(self) -> None:
        """No package is needed."""

    def store(self, weight: Tensor, dtype: torch.dtype) -> _Rows:
        scales = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / _LARGEST
        return _Rows((weight.float() / scales).round().to(torch.int8), scales, dtype)


FORMAT = _Int8()
