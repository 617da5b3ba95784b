"""Adafactor as it can be right on every layout: second moments with a growing memory and nothing else, one number for each weight.

What the paper computes over a tensor's rows and columns is left out: ZeRO cuts tensors into flat pieces, so that such sums would depend on
how many replicas there are. The moments are spread over replicas instead. The learning rate is the schedule's, not relative to the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

_DECAY_EXPONENT = -0.8


class Adafactor(torch.optim.Optimizer):
    def __init__(self, parameters: Iterable[Any], lr: float, eps: float) -> None:
        super().__init__(parameters, {"lr": lr, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                decay = 1.0 - float(state["step"]) ** _DECAY_EXPONENT
                moment = state["exp_avg_sq"]
                moment.mul_(decay).addcmul_(parameter.grad, parameter.grad, value=1.0 - decay)
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(parameter.grad, moment.sqrt().add_(group["eps"]), value=-group["lr"])
