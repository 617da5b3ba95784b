"""Matmuls in float32 on a CPU through oneDNN. torch ships it but uses it for other dtypes only, and its own float32
kernels are half as fast on some processors. All other matmuls are torch's.

The only private name of torch is in `_operations`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

_SMALLEST = 2**20  # with fewer multiplications the call costs more than it saves


def _operations() -> tuple[Callable[..., Tensor], ...]:
    """oneDNN's x W^T + bias in a tuple, or an empty one if this torch has no oneDNN."""
    is_there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return (torch.ops.mkldnn._linear_pointwise.default,) if is_there else ()


OPERATIONS = _operations()


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Like torch.nn.functional.linear, with gradients."""
    if not _is_ours(hidden, weight):
        return F.linear(hidden, weight, bias)
    function: Any = _Product
    output: Tensor = function.apply(hidden.flatten(0, -2), weight, bias)
    return output.view(*hidden.shape[:-1], -1)


def multiply(left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """left @ right, without gradients."""
    if not _is_ours(left_MK, right_KN):
        return left_MK @ right_KN
    result: Tensor = OPERATIONS[0](left_MK, right_KN.t(), None, "none", [], "")
    return result


def use_in(model: nn.Module) -> None:
    """Replace the model's plain linear layers by ones that multiply through oneDNN, with the same parameters."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, _Linear(child))


def _is_ours(left: Tensor, right: Tensor) -> bool:
    is_plain = left.device.type == "cpu" and left.dtype is right.dtype is torch.float32
    if torch.compiler.is_compiling():
        return False
    return is_plain and left.numel() * right.numel() >= _SMALLEST * left.size(-1) and bool(OPERATIONS)


class _Linear(nn.Linear):
    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        self.weight, self.bias = plain.weight, plain.bias

    def forward(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weight, self.bias)


class _Product(Function):
    @staticmethod
    def forward(context: Any, hidden_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        context.save_for_backward(hidden_TI, weight_OI)
        context.has_bias = bias_O is not None
        return OPERATIONS[0](hidden_TI, weight_OI, bias_O, "none", [], "")

    @staticmethod
    def backward(context: Any, gradient_TO: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TI, weight_OI = context.saved_tensors
        needs_hidden, needs_weight, needs_bias = context.needs_input_grad
        gradient_TI = multiply(gradient_TO, weight_OI) if needs_hidden else None
        gradient_OI = multiply(gradient_TO.t(), hidden_TI) if needs_weight else None
        return gradient_TI, gradient_OI, gradient_TO.sum(0) if needs_bias else None
