"""LayerNorm in 16 bits on a CPU, with gradients that are summed in float32.

torch's own CPU kernel sums the gradients of weight and bias over tokens in the 16-bit format: over the 2,000 tokens of
a packed row they are off by several percent (torch 2.13). Its GPU kernel sums in float32. RMSNorm is not affected.
"""

from __future__ import annotations

from itertools import compress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function


def use_in(model: nn.Module) -> None:
    """Replace the model's LayerNorms by ones with the same parameters that sum in float32."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.LayerNorm:
                setattr(parent, name, _LayerNorm(child))


class _LayerNorm(nn.LayerNorm):
    def __init__(self, plain: nn.LayerNorm) -> None:
        super().__init__(plain.normalized_shape, plain.eps, elementwise_affine=False)
        self.weight, self.bias = plain.weight, plain.bias

    def forward(self, hidden: Tensor) -> Tensor:
        function: Any = _InFloat32
        output: Tensor = function.apply(hidden, self.weight, self.bias, self.normalized_shape, self.eps)
        return output


class _InFloat32(Function):
    """Keeps its 16-bit input for the backward pass, as torch's own does, and normalises it there once more."""

    @staticmethod
    def forward(
        context: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...], eps: float
    ) -> Tensor:
        context.save_for_backward(hidden, weight, bias)
        context.shape, context.eps = shape, eps
        wide_weight, wide_bias = (None if one is None else one.float() for one in (weight, bias))
        return F.layer_norm(hidden.float(), shape, wide_weight, wide_bias, eps).to(hidden.dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needs = context.needs_input_grad[:3]
        with torch.enable_grad():
            wide: list[Any] = [
                one if one is None else one.detach().float().requires_grad_(is_needed)
                for one, is_needed in zip(context.saved_tensors, needs, strict=True)
            ]
            output = F.layer_norm(wide[0], context.shape, wide[1], wide[2], context.eps)
        found = iter(torch.autograd.grad(output, list(compress(wide, needs)), gradient.float()))
        gradients = [next(found).to(gradient.dtype) if is_needed else None for is_needed in needs]
        return (*gradients, None, None)
