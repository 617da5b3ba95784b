"""Adafactor (Shazeer and Stern, 2018) as transformers has it, with the schedule's learning rate: second moments of a
matrix are factored.

A tensor is whole on the replica that owns it. Tensor ranks put their parts of its gradient together, and each updates
its own part.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sft.optimizer.algorithms.interface import Work, decaying_groups
from sft.optimizer.shards import part_of, whole_of
from sft.optimizer.whole import WholeTensorOptimizer

_DECAY_EXPONENT, _TINY, _LARGEST_RMS = -0.8, 1e-30, 1.0


def make(work: Work) -> list[torch.optim.Optimizer]:
    return [Adafactor(decaying_groups(work), lr=work.spec.lr, places=work.places, group=work.group)]


class Adafactor(WholeTensorOptimizer):
    def _update(self, parameter: Tensor, part: Tensor, lr: float, weight_decay: float) -> None:
        place = self._places[parameter]
        gradient = whole_of(part, place, self._group)
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state.update(_moments(gradient))
        state["step"] += 1
        decay = 1.0 - float(state["step"]) ** _DECAY_EXPONENT
        update = _scaled(state, gradient, decay)
        update.div_((update.square().mean().sqrt() / _LARGEST_RMS).clamp_(min=1.0))
        parameter.mul_(1.0 - lr * weight_decay)
        parameter.add_(part_of(update, place), alpha=-lr)


def _moments(gradient: Tensor) -> dict[str, Tensor]:
    if gradient.dim() < 2:
        return {"exp_avg_sq": torch.zeros_like(gradient)}
    return {
        "exp_avg_sq_row": gradient.new_zeros(gradient.shape[:-1]),
        "exp_avg_sq_col": gradient.new_zeros(gradient.shape[1:]),
    }


def _scaled(state: Mapping[str, Tensor], gradient: Tensor, decay: float) -> Tensor:
    """Return the gradient divided by the root of its second moments."""
    square = gradient.square().add_(_TINY)
    if gradient.dim() < 2:
        moment = state["exp_avg_sq"].mul_(decay).add_(square, alpha=1.0 - decay)
        return moment.rsqrt().mul_(gradient)
    row = state["exp_avg_sq_row"].mul_(decay).add_(square.mean(-1), alpha=1.0 - decay)
    column = state["exp_avg_sq_col"].mul_(decay).add_(square.mean(0), alpha=1.0 - decay)
    return gradient * (row / row.mean()).rsqrt()[:, None] * column.rsqrt()[None, :]
