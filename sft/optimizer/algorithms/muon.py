"""Muon (Jordan, 2024) as torch has it: a matrix's momentum, made nearly orthogonal, is its update. For matrices inside
the layers.

A matrix is whole on the replica that owns it, and put together from the parts of tensor ranks; each updates its own
part. The update is scaled to the size of one by AdamW, so that --lr and --weight_decay mean what they mean there.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sft.optimizer.algorithms import adamw
from sft.optimizer.algorithms.interface import Work, decaying_groups
from sft.optimizer.shards import Shard, part_of, whole_of
from sft.optimizer.whole import WholeTensorOptimizer

_MOMENTUM, _TINY = 0.95, 1e-7
_COEFFICIENTS, _STEPS = (3.4445, -4.7750, 2.0315), 5  # of the Newton-Schulz iteration
_LIKE_ADAMW = 0.2  # root mean square of a typical AdamW update


def make(work: Work) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the layers, and AdamW for the rest."""
    matrices = replace(work, shards=[shard for shard in work.shards if _is_muon(shard, work)])
    rest = replace(work, shards=[shard for shard in work.shards if not _is_muon(shard, work)])
    made: list[torch.optim.Optimizer] = []
    if matrices.shards:
        made.append(Muon(decaying_groups(matrices), lr=work.spec.lr, places=matrices.places, group=work.group))
    return made + (adamw.make(rest) if rest.shards else [])


def _is_muon(shard: Shard, work: Work) -> bool:
    return shard.is_matrix and shard.name not in work.outside


class Muon(WholeTensorOptimizer):
    def _update(self, parameter: Tensor, part: Tensor, lr: float, weight_decay: float) -> None:
        state, place = self.state[parameter], self._places[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(part)
        momentum = state["momentum_buffer"].lerp_(part, 1 - _MOMENTUM)
        ahead = part.lerp(momentum, _MOMENTUM)  # Nesterov's
        update = orthogonalised(whole_of(ahead, place, self._group))
        size = _LIKE_ADAMW * max(update.shape) ** 0.5
        parameter.mul_(1.0 - lr * weight_decay)
        parameter.add_(part_of(update.to(parameter.dtype), place), alpha=-lr * size)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return approximately U V^T for the matrix U S V^T, in bfloat16."""
    a, b, c = _COEFFICIENTS
    made = matrix.bfloat16()
    is_tall = made.size(0) > made.size(1)
    made = made.t() if is_tall else made
    made = made / made.norm().clamp(min=_TINY)
    for _ in range(_STEPS):
        square = made @ made.t()
        made = torch.addmm(made, torch.addmm(square, square, square, beta=b, alpha=c), made, beta=a)
    return made.t() if is_tall else made
