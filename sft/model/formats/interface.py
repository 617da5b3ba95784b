"""The interface of a format of frozen weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor


class Stored(Protocol):
    """A weight in the format."""

    def whole(self) -> Tensor:
        """The weight in the compute dtype."""
        ...

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that it keeps."""
        ...


class Format(Protocol):
    def check(self) -> None:
        """Raise UserError if a requirement is missing."""
        ...

    def store(self, weight: Tensor, dtype: torch.dtype) -> Stored:
        """Quantise a matrix on its device, for computing in `dtype`."""
        ...
