"""A linear layer whose weight may be quantised and which may have a low-rank adapter. Names are PEFT's. An adapter
adds scale * B A x to W x. A_RI has `rank` rows, B_OR `rank` columns; only they are trained.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function

from sft.model import matmul


class FrozenWeight(Protocol):
    """A frozen weight that is not a tensor, such as a quantised one."""

    def product(self, hidden: Tensor) -> Tensor: ...


class Dropout(Protocol):
    """Dropout of an adapter's inputs in training."""

    def low(self, hidden_TI: Tensor, a_RI: Tensor) -> Tensor: ...


class Factor(nn.Module):
    """A or B: a weight with its own name."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class Linear(nn.Module):
    """torch's Linear with room for both. `forward` is for a layer that is whole on every rank."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = weight
        self.bias = bias
        self.frozen: FrozenWeight | None = None  # replaces the weight
        self.dropout: Dropout | None = None
        self._scale = 0.0

    def add_adapter(self, a_RI: nn.Parameter, b_OR: nn.Parameter, scale: float) -> None:
        self.lora_A, self.lora_B = Factor(a_RI), Factor(b_OR)
        self._scale = scale

    def forward(self, hidden: Tensor) -> Tensor:
        return self.product(hidden, self.bias)

    def product(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """W x + bias plus the adapter. With tensor parallelism, this rank's features or its partial sum."""
        drops = self.dropout is not None and self.training
        # The compiler fuses the plain formula, and torch 2.11's loses the gradients of such a Function.
        if self._scale and self.frozen is None and not drops and not torch.compiler.is_compiling():
            assert self.weight is not None
            flat: Tensor = _Adapted.apply(  # type: ignore[no-untyped-call]
                hidden.flatten(0, -2), self.weight, bias, self.lora_A.weight, self.lora_B.weight, self._scale
            )
            return flat.view(*hidden.shape[:-1], -1)
        output = self._base_product(hidden, bias)
        if not self._scale:
            return output
        flat_TI = hidden.flatten(0, -2)
        if drops:
            assert self.dropout is not None
            low = self.dropout.low(flat_TI, self.lora_A.weight)
        else:
            low = matmul.linear(flat_TI, self.lora_A.weight, None)
        return torch.addmm(output.flatten(0, -2), low, self.lora_B.weight.t(), alpha=self._scale).view_as(output)

    def _base_product(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        if self.frozen is not None:
            output = self.frozen.product(hidden)
            return output if bias is None else output + bias
        assert self.weight is not None
        return matmul.linear(hidden, self.weight, bias)


class _Adapted(Function):
    """x W^T + bias + scale * x A^T B^T with trained A and B. One pass fewer over the gradient of x than with two
    matmuls.
    """

    @staticmethod
    def forward(
        context: Any,
        hidden_TI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
    ) -> Tensor:
        low_TR = matmul.multiply(hidden_TI, a_RI.t())
        context.save_for_backward(hidden_TI, weight_OI, a_RI, b_OR, low_TR)
        context.scale = scale
        output_TO = matmul.linear(hidden_TI, weight_OI, bias_O)
        # Selective recomputation keeps results of `addmm`, and has the weight's already. This sum is recomputed,
        # because it has an `out`.
        return torch.addmm(output_TO, low_TR, b_OR.t(), alpha=scale, out=torch.empty_like(output_TO))

    @staticmethod
    def backward(context: Any, gradient_TO: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        hidden_TI, weight_OI, a_RI, b_OR, low_TR = context.saved_tensors
        scaled_TR = matmul.multiply(gradient_TO, b_OR).mul_(context.scale)
        gradient_TI = (
            matmul.multiply(gradient_TO, weight_OI).addmm_(scaled_TR, a_RI) if context.needs_input_grad[0] else None
        )
        return (
            gradient_TI,
            None,
            None,
            matmul.multiply(scaled_TR.t(), hidden_TI),
            matmul.multiply(gradient_TO.t(), low_TR).mul_(context.scale),
            None,
        )
