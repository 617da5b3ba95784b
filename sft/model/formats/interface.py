"""The interface of a format of frozen weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor


class Stored(Protocol):
    """A weight in the format."""

    def whole(self) -> Tensor:
        """The weight, in the dtype that is computed in."""
        ...

    def tensors(self) -> Iterator[Tensor]:
        """All memory that it takes."""
        ...


class Format(Protocol):
    def check(self) -> None:
        """Raise UserError where something is missing that it needs."""
        ...

    def store(self, weight: Tensor, dtype: torch.dtype) -> Stored:
        """A matrix on its device, to be computed with in `dtype`."""
        ...
