"""Sizes of tensors that a sum in float32 would get wrong: torch's own norm on a CPU is off by a thousandth for an
embedding's gradient. On a GPU it adds up in a tree, which is as exact as it has to be, and takes all tensors in a few
launches.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_ROW = 1024  # squares summed in float32 at once: an error of 2e-8 of the norm


def square_sum(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return the sum of all squares, in float64."""
    given = list(tensors)
    if not given:
        return torch.zeros((), dtype=torch.float64, device=device)
    if device.type == "cuda":
        return torch.nn.utils.get_total_norm(given, foreach=True).double().square()
    return torch.stack([_square_sum(tensor.reshape(-1)) for tensor in given]).sum()


def _square_sum(flat: Tensor) -> Tensor:
    whole = flat.numel() // _ROW * _ROW
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1).double()
    total: Tensor = norms.square().sum() + flat[whole:].double().square().sum()
    return total
