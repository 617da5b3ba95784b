"""Base class of optimizers that need whole tensors: tensor-parallel ranks of the owning replica gather their parts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sft.model.collectives import TensorGroup
from sft.model.tensor_parallel import ParameterShard


class WholeTensorOptimizer(torch.optim.Optimizer):
    def __init__(
        self, parameters: Iterable[Any], *, lr: float, places: Mapping[Tensor, ParameterShard], group: TensorGroup
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": 0.0})
        self._places, self._group = places, group

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"], group["weight_decay"])

    @abstractmethod
    def _update(self, parameter: Tensor, part: Tensor, lr: float, weight_decay: float) -> None:
        """Update the parameter. `part` is this rank's part of the gradient."""
