"""Frozen weights in 4 or 8 bits. Each rank quantises its own slices; a product makes the weight whole for as long as it
takes.

4 bits: NormalFloat in blocks of 64 values, with scales in 8 bits themselves (bitsandbytes' NF4 with double
quantisation). 8 bits: integers, with a scale for each row, as bitsandbytes stores them; activations stay as they are.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from sft.model.anatomy import Anatomy
from sft.model.linear import Linear
from sft.model.lora import as_linear
from sft.model.tensor_parallel import Place
from tokenize_data.errors import UserError

BITS = (4, 8)
_BLOCK = 64


class QuantizedWeight:
    """A matrix that is multiplied with and never trained. No tensor of it is a parameter or a buffer, so that no cast
    reaches it.
    """

    def __init__(self, bits: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        assert bits in BITS, bits
        self.bits, self.shape, self.dtype, self.device = bits, shape, dtype, device
        self._values: Tensor | None = None
        self._scales: Any = None

    def fill(self, weight: Tensor) -> None:
        assert tuple(weight.shape) == self.shape, (weight.shape, self.shape)
        weight = weight.detach().to(self.device)
        if self.bits == 4:
            # Flat: on the CPU, 0.50.2 makes something else of rows whose length is no multiple of the block's.
            self._values, self._scales = _library().quantize_4bit(
                weight.to(self.dtype).flatten(), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
            )
        else:
            self._scales = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            self._values = (weight.float() / self._scales).round().to(torch.int8)

    def whole(self) -> Tensor:
        """In the dtype that is computed in."""
        assert self._values is not None, "a quantised weight was not loaded"
        if self.bits == 4:
            made: Tensor = _library().dequantize_4bit(self._values, self._scales).view(self.shape)
        else:
            made = (self._values.float() * self._scales).to(self.dtype)
        return made

    def product(self, hidden: Tensor) -> Tensor:
        output: Tensor = _Product.apply(hidden, self)  # type: ignore[no-untyped-call]
        return output

    @property
    def num_bytes(self) -> int:
        assert self._values is not None
        return self._values.nbytes + sum(tensor.nbytes for tensor in _tensors_of(self._scales))


class _Product(Function):
    """hidden W^T. Nothing is kept for the gradient: the weight is made whole again."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, weight: QuantizedWeight) -> Tensor:
        context.weight = weight
        return hidden @ weight.whole().t()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ context.weight.whole(), None


def quantize(model: Any, anatomy: Anatomy, bits: int, device: torch.device) -> dict[str, QuantizedWeight]:
    """Take the weights of the layers' frozen linear modules out of `model` (on meta). By parameter name, what is there
    instead.
    """
    if bits == 4:
        _library()
    made = {}
    for name, module in list(model.get_submodule(anatomy.layers).named_modules(prefix=anatomy.layers)):
        if isinstance(module, nn.Linear | Linear) and module.weight is not None and not module.weight.requires_grad:
            linear = as_linear(model, name)
            assert linear.weight is not None
            made[f"{name}.weight"] = QuantizedWeight(bits, tuple(linear.weight.shape), linear.weight.dtype, device)
            linear.frozen, linear.weight = made[f"{name}.weight"], None
    return made


def fill(weights: Mapping[str, QuantizedWeight], places: Mapping[str, Place], read: Any) -> None:
    """`read(name, part)` gives this rank's part of a tensor. One at a time."""
    for name, weight in weights.items():
        weight.fill(read(name, places[name].part))


def widen_norms(stage: nn.Module) -> None:
    """Frozen norms of a quantised model are computed in float32, and give what they were given. Casts of the whole
    model come before.
    """
    for module in stage.modules():
        own = list(module.parameters(recurse=False))
        if (
            own
            and all(parameter.dim() == 1 and not parameter.requires_grad for parameter in own)
            and not isinstance(module, Linear)
        ):
            module.float()
            module.forward = _wide(module.forward)


def _wide(forward: Any) -> Any:
    def wide(hidden: Tensor, *arguments: Any) -> Tensor:
        output: Tensor = forward(hidden.float(), *arguments)
        return output.to(hidden.dtype)

    return wide


def _tensors_of(scales: Any) -> Iterator[Tensor]:
    if isinstance(scales, Tensor):
        yield scales
    elif scales is not None:
        yield scales.absmax
        if scales.nested:
            yield scales.offset
            yield from _tensors_of(scales.state2)


def _library() -> Any:
    try:
        with _quiet():
            import bitsandbytes.functional
    except ImportError as error:
        raise UserError(
            "--load_in_4bit needs bitsandbytes: pip install 'megasft[quantized]', or use --weight_only_8bit"
        ) from error
    return bitsandbytes.functional


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """While it is imported it says what it looks for in vain."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
