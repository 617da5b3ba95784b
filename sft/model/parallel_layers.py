"""Tensor-parallel linear layers and embeddings: each rank holds a part. Parameter names stay those of the Hugging Face
model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sft.model import collectives
from sft.model.collectives import TensorGroup
from sft.model.linear import Linear


class ColumnParallel(Linear):
    """A linear layer split by output features. Its input has entered the region already, unless the layer is its own
    region.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, group: TensorGroup, *, gather_output: bool
    ) -> None:
        super().__init__(weight, bias)
        self._group, self._gather_output = group, gather_output

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.product(hidden, self.bias)
        return collectives.gather(output, self._group, -1) if self._gather_output else output


class RowParallel(Linear):
    """A linear layer split by input features: its partial sums leave the region here, and the bias is added once
    afterwards.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, group: TensorGroup, *, split_input: bool, stretches: bool
    ) -> None:
        super().__init__(weight, bias)
        self._group, self._split_input, self._stretches = group, split_input, stretches

    def forward(self, hidden: Tensor) -> Tensor:
        if self._split_input:
            hidden = collectives.split(hidden, self._group, -1)
        output = collectives.leave_region(self.product(hidden, None), self._group, self._stretches)
        return output if self.bias is None else output + self.bias


def enters_region(group: TensorGroup, stretches: bool) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
    """A forward pre-hook for a region's module: hidden states enter once for all its linear layers."""

    def hook(
        module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if arguments:
            return (collectives.enter_region(arguments[0], group, stretches), *arguments[1:]), options
        return arguments, {
            **options,
            "hidden_states": collectives.enter_region(options["hidden_states"], group, stretches),
        }

    return hook


def split_vocabulary(embedding: nn.Embedding, weight: nn.Parameter, start: int, group: TensorGroup) -> None:
    """Let an embedding hold rows `start` and following. Ids of other ranks give zeros here, and the sum over ranks is
    whole.

    Hooks, not another class: what a family's own embedding does besides, such as scaling, stays.
    """
    rows, padding = weight.size(0), embedding.padding_idx
    waiting: list[Tensor] = []  # ids on other ranks, passed from the first hook to the second
    embedding.weight = weight
    embedding.num_embeddings = rows
    embedding.padding_idx = padding - start if padding is not None and start <= padding < start + rows else None

    def to_local(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ids = arguments[0] - start
        absent = (ids < 0) | (ids >= rows)
        waiting.append(absent)
        return (ids.masked_fill(absent, 0 if module.padding_idx != 0 or rows == 1 else 1),)

    def to_whole(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return collectives.leave_region(output.masked_fill(waiting.pop()[..., None], 0.0), group, False)

    embedding.register_forward_pre_hook(to_local)
    embedding.register_forward_hook(to_whole)


class ShardedRMSNorm(nn.Module):
    """RMSNorm over features that are split over ranks, with the mean square of all of them."""

    def __init__(self, weight: nn.Parameter, epsilon: float, group: TensorGroup) -> None:
        super().__init__()
        self.weight, self._epsilon, self._group = weight, epsilon, group

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.to(torch.float32)
        squares = collectives.sum_of_parts(wide.square().sum(-1, keepdim=True), self._group)
        normed = wide * torch.rsqrt(squares / (wide.size(-1) * self._group.size) + self._epsilon)
        return (self.weight * normed).to(hidden.dtype)
