"""Sum an iteration's gradients over its micro-batches in float32, whatever the dtype of the weights.

For float32 weights, autograd's own sums are used. A gradient in lower precision is added to a float32 sum as soon as
it is computed and then freed, so only one exists at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class GradientSums:
    def __init__(
        self, parameters: Mapping[str, nn.Parameter], on_complete: Callable[[str], None] | None = None
    ) -> None:
        """`on_complete` gets a parameter's name once its last micro-batch is summed."""
        self._parameters = dict(parameters)
        self._sums: dict[str, Tensor] = {}
        self._seen: dict[str, int] = {}
        self._on_complete, self._expected = on_complete, 0
        for name, parameter in self._parameters.items():
            if on_complete is not None or parameter.dtype is not torch.float32:
                parameter.register_post_accumulate_grad_hook(lambda parameter, name=name: self._add(name, parameter))

    def begin(self, num_micro_batches: int) -> None:
        self.clear()
        self._expected = num_micro_batches

    def take(self, name: str) -> Tensor:
        """Remove and return the sum."""
        parameter = self._parameters[name]
        if name in self._sums:
            return self._sums.pop(name)
        gradient = parameter.grad
        assert gradient is not None, f"{name} got no gradient"
        parameter.grad = None
        return gradient

    def clear(self) -> None:
        self._sums.clear()
        self._seen.clear()
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def _add(self, name: str, parameter: Tensor) -> None:
        if parameter.dtype is not torch.float32:
            assert parameter.grad is not None
            if name in self._sums:
                self._sums[name].add_(parameter.grad)
            else:
                self._sums[name] = parameter.grad.float()
            parameter.grad = None
        self._seen[name] = self._seen.get(name, 0) + 1
        if self._on_complete is not None and self._seen[name] == self._expected:
            self._on_complete(name)
