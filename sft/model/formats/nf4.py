"""NormalFloat of 4 bits in blocks of 64 values, with scales in 8 bits themselves: bitsandbytes' NF4 with double
quantisation.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenize_data.errors import UserError

_BLOCK = 64


@dataclass(frozen=True)
class _Blocks:
    values: Tensor
    scales: Any
    shape: tuple[int, ...]

    def whole(self) -> Tensor:
        made: Tensor = _library().dequantize_4bit(self.values, self.scales).view(self.shape)
        return made

    def tensors(self) -> Iterator[Tensor]:
        yield self.values
        yield from _tensors_of(self.scales)


class _NormalFloat:
    def check(self) -> None:
        _library()

    def store(self, weight: Tensor, dtype: torch.dtype) -> _Blocks:
        # Flat: on the CPU, 0.50.2 makes something else of rows whose length is no multiple of the block's.
        values, scales = _library().quantize_4bit(
            weight.to(dtype).flatten(), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        return _Blocks(values, scales, tuple(weight.shape))


FORMAT = _NormalFloat()


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
    """bitsandbytes logs each library that it does not find during its import."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
