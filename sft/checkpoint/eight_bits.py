"""bitsandbytes' 8-bit optimizer states as numbers, for checkpoints: its blocks begin elsewhere with another layout.

A state is codes of 8 bits, each the number of a value in a table, and for each block of 256 the factor of these values. The factor is the
block's largest magnitude, so numbers give their codes and factors back; where it is negative, the table ends a little before -1, which is
made up for here. Small tensors are kept in float32 by bitsandbytes itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAMES = {"state1": "exp_avg", "state2": "exp_avg_sq"}  # ours are torch's, so that any AdamW's reader knows them
_BLOCK = 256


def is_of_8_bits(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__module__.startswith("bitsandbytes")


def read(state: dict[str, Any]) -> dict[str, Tensor]:
    """The states of a tensor as float32, flat, by torch's names: copies, or bitsandbytes' own memory where that is float32."""
    return {ours: _numbers(state, theirs) for theirs, ours in NAMES.items()}


def write(state: dict[str, Any], numbers: dict[str, Tensor]) -> None:
    """Numbers from `read`, changed maybe, back into the state."""
    for theirs, ours in NAMES.items():
        codes = state[theirs]
        if codes.dtype == torch.uint8:
            table, factors = state[f"qmap{theirs[-1]}"], state[f"absmax{theirs[-1]}"]
            found, largest = _quantised(numbers[ours], table)
            codes.copy_(found.view_as(codes))
            factors.copy_(largest)


def _numbers(state: dict[str, Any], name: str) -> Tensor:
    codes: Tensor = state[name]
    if codes.dtype != torch.uint8:
        return codes
    table: Tensor = state[f"qmap{name[-1]}"]
    factors: Tensor = state[f"absmax{name[-1]}"]
    return table[codes.flatten().long()] * factors.repeat_interleave(_BLOCK)[: codes.numel()]


def _quantised(numbers: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, a factor for each block)."""
    blocks = torch.nn.functional.pad(numbers, (0, -numbers.numel() % _BLOCK)).view(-1, _BLOCK)
    highest, lowest = blocks.amax(1), blocks.amin(1)
    is_signed = float(table[0]) < 0  # where both ends are as large, the negative one was the block's largest: a positive one would be +1
    largest = torch.where(highest > -lowest, highest, lowest / float(table[0])) if is_signed else highest
    scaled = blocks / torch.where(largest > 0, largest, 1).unsqueeze(1)
    between = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(scaled, between)
    for nearly in (largest.nextafter(torch.zeros_like(largest)), largest.nextafter(torch.full_like(largest, torch.inf))):
        is_exact = (table[codes] * nearly.unsqueeze(1) == blocks).all(1)  # the division was rounded: a neighbour gives the same numbers
        largest = torch.where(is_exact, nearly, largest)
    return codes.to(torch.uint8).flatten()[: numbers.numel()], largest
