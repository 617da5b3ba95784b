"""Copies micro-batches to the device from pinned memory, one ahead of the computation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sft.engine.feed import MicroBatch


def sent(micro_batches: Iterator[MicroBatch], device: torch.device) -> Iterator[MicroBatch]:
    """Yield the micro-batches on `device`. On a CPU they are passed through."""
    if device.type != "cuda":
        yield from micro_batches
        return
    ahead: MicroBatch | None = None
    for given in micro_batches:
        (ids_RT, positions_RT), labels = given
        following = (
            (_sent(ids_RT, device), _sent(positions_RT, device)),
            tuple(_sent(label, device) for label in labels),
        )
        if ahead is not None:
            yield ahead
        ahead = following
    if ahead is not None:
        yield ahead


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True)
