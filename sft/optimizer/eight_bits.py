"""bitsandbytes' 8-bit optimizer states as numbers, for checkpoints: its blocks begin elsewhere with another layout.

A state is codes of 8 bits, each the number of a value in a table, and for each block of 256 the factor of these values.
The factor is the block's largest magnitude, so numbers give their codes and factors back; where it is negative, the
table ends a little before -1, which is made up for here. Small tensors are kept in float32 by bitsandbytes itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAMES = {"state1": "exp_avg", "state2": "exp_avg_sq"}  # torch's names, which every AdamW checkpoint uses
_BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class EightBits:
    """A state in bitsandbytes' form: codes, the value of each code, the factor of each block."""

    codes: Tensor
    table: Tensor
    factors: Tensor

    def numbers(self) -> Tensor:
        """Return the state as a flat float32 tensor."""
        return self.table[self.codes.flatten().long()] * self.factors.repeat_interleave(_BLOCK)[: self.codes.numel()]

    def put(self, numbers: Tensor) -> None:
        """Quantise these numbers into the state."""
        found, largest = _quantised(numbers, self.table)
        self.codes.copy_(found.view_as(self.codes))
        self.factors.copy_(largest)

    def copied(self, copy: Callable[[Tensor], Tensor]) -> EightBits:
        return EightBits(codes=copy(self.codes), table=copy(self.table), factors=copy(self.factors))


def states_of(state: Mapping[str, Any]) -> dict[str, Tensor | EightBits]:
    """Return the states by torch's names; empty if the state is not from bitsandbytes."""
    found: dict[str, Tensor | EightBits] = {}
    for theirs, ours in NAMES.items():
        if theirs in state:
            number, is_float = theirs[-1], state[theirs].dtype != torch.uint8
            found[ours] = (
                state[theirs]
                if is_float
                else EightBits(codes=state[theirs], table=state[f"qmap{number}"], factors=state[f"absmax{number}"])
            )
    return found


def _quantised(numbers: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes and the factor of each block."""
    blocks = torch.nn.functional.pad(numbers, (0, -numbers.numel() % _BLOCK)).view(-1, _BLOCK)
    highest, lowest = blocks.amax(1), blocks.amin(1)
    is_signed = (
        float(table[0]) < 0
    )  # where both ends are as large, the negative one was the block's largest: a positive one would be +1
    largest = torch.where(highest > -lowest, highest, lowest / float(table[0])) if is_signed else highest
    scaled = blocks / torch.where(largest > 0, largest, 1).unsqueeze(1)
    between = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(scaled, between)
    for nearly in (
        largest.nextafter(torch.zeros_like(largest)),
        largest.nextafter(torch.full_like(largest, torch.inf)),
    ):
        is_exact = (table[codes] * nearly.unsqueeze(1) == blocks).all(
            1
        )  # the division was rounded: a neighbour gives the same numbers
        largest = torch.where(is_exact, nearly, largest)
    return codes.to(torch.uint8).flatten()[: numbers.numel()], largest
