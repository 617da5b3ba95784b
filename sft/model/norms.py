"""LayerNorm in 16 bits on a CPU, computed in float32.

torch's own CPU kernel sums the gradients of weight and bias over tokens in the 16-bit format: over the 2,000 tokens of
a packed row they are off by several percent (torch 2.13). Its GPU kernel sums in float32. RMSNorm is not affected.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        if hidden.device.type != "cpu" or hidden.dtype is torch.float32:
            return super().forward(hidden)
        weight, bias = (None if one is None else one.float() for one in (self.weight, self.bias))
        return F.layer_norm(hidden.float(), self.normalized_shape, weight, bias, self.eps).to(hidden.dtype)
