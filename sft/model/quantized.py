"""Quantised frozen weights. Each rank quantises its own slices; a matmul dequantises the weight for as long as it needs
it. The formats are in `formats`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from sft.config.quantisation import Quantisation
from sft.model.anatomy import Anatomy
from sft.model.formats.interface import Format, Stored
from sft.model.linear import Linear
from sft.model.lora import as_linear
from sft.model.tensor_parallel import ParameterShard


def format_of(quantisation: Quantisation) -> Format:
    """Import a format by name, so that a new one is one file."""
    found: Format = importlib.import_module(f"sft.model.formats.{quantisation.name}").FORMAT
    return found


class QuantizedWeight:
    """A frozen matrix. Its tensors are neither parameters nor buffers, so that they are not cast."""

    def __init__(
        self, quantisation: Quantisation, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self._format = format_of(quantisation)
        self._stored: Stored | None = None

    def fill(self, weight: Tensor) -> None:
        assert tuple(weight.shape) == self.shape, (weight.shape, self.shape)
        self._stored = self._format.store(weight.detach().to(self.device), self.dtype)

    def whole(self) -> Tensor:
        """The dequantised weight in the compute dtype."""
        assert self._stored is not None, "a quantised weight was not loaded"
        return self._stored.whole()

    def product(self, hidden: Tensor) -> Tensor:
        output: Tensor = _Product.apply(hidden, self)  # type: ignore[no-untyped-call]
        return output

    @property
    def num_bytes(self) -> int:
        assert self._stored is not None
        return sum(tensor.nbytes for tensor in self._stored.tensors())


class _Product(Function):
    """hidden W^T, without keeping the weight for the backward pass, where it is dequantised again."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, weight: QuantizedWeight) -> Tensor:
        context.weight = weight
        return hidden @ weight.whole().t()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ context.weight.whole(), None


def quantize(
    model: Any, anatomy: Anatomy, quantisation: Quantisation, device: torch.device
) -> dict[str, QuantizedWeight]:
    """Replace frozen linear weights of `model` (on meta) by quantised ones, and return these by parameter name."""
    format_of(quantisation).check()
    made = {}
    for name, module in list(model.get_submodule(anatomy.layers).named_modules(prefix=anatomy.layers)):
        if isinstance(module, nn.Linear | Linear) and module.weight is not None and not module.weight.requires_grad:
            linear = as_linear(model, name)
            assert linear.weight is not None
            made[f"{name}.weight"] = QuantizedWeight(
                quantisation, tuple(linear.weight.shape), linear.weight.dtype, device
            )
            linear.frozen, linear.weight = made[f"{name}.weight"], None
    return made


def fill(weights: Mapping[str, QuantizedWeight], places: Mapping[str, ParameterShard], read: Any) -> None:
    """Fill the weights one by one; `read(name, part)` returns this rank's part of a tensor."""
    for name, weight in weights.items():
        weight.fill(read(name, places[name].part))


def widen_norms(stage: nn.Module) -> None:
    """Compute frozen norms of a quantised model in float32; their results are cast back. Call it after casts of the
    whole model.
    """
    for module in stage.modules():
        own = list(module.parameters(recurse=False))
        is_frozen_norm = own and all(parameter.dim() == 1 and not parameter.requires_grad for parameter in own)
        if is_frozen_norm and not isinstance(module, Linear):
            dtype = own[0].dtype
            module.float()
            module.register_forward_pre_hook(lambda norm, given: (given[0].float(), *given[1:]))
            module.register_forward_hook(partial(_cast_back, dtype))


def _cast_back(dtype: torch.dtype, norm: nn.Module, given: Any, output: Tensor) -> Tensor:
    return output.to(dtype)
