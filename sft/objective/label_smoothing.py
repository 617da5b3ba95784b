"""Cross-entropy with label smoothing: the target spreads a share of the probability evenly over all tokens.

The loss of a token is nll + smoothing * (its logit - the mean of all logits). Validation reports the plain
cross-entropy, so that runs stay comparable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from sft.model.collectives import TensorGroup
from sft.objective.cross_entropy import CrossEntropy
from sft.objective.interface import Head


class _AboveMean(Function):
    """Compute each target's logit minus the mean logit over the vocabulary, from this rank's logits."""

    @staticmethod
    def forward(context: Any, logits_NV: Tensor, targets_N: Tensor, vocabulary_size: int, group: TensorGroup) -> Tensor:
        columns = logits_NV.size(-1)
        start = group.rank * columns
        real = min(max(vocabulary_size - start, 0), columns)  # padding past the vocabulary does not count
        local_N = targets_N - start
        absent_N = (local_N < 0) | (local_N >= columns)
        local_N = local_N.masked_fill(absent_N, 0)
        chosen_N = logits_NV.gather(-1, local_N[:, None])[:, 0].masked_fill(absent_N, 0.0)
        context.save_for_backward(local_N, absent_N)
        context.columns, context.real, context.share = columns, real, 1.0 / vocabulary_size
        return group.sum(chosen_N - logits_NV[:, :real].sum(-1) * context.share)

    @staticmethod
    def backward(context: Any, gradient_N: Tensor) -> tuple[Tensor, None, None, None]:
        local_N, absent_N = context.saved_tensors
        gradient_NV = gradient_N.new_zeros(len(local_N), context.columns)
        gradient_NV[:, : context.real] = -context.share * gradient_N[:, None]
        rows = torch.arange(local_N.numel(), device=local_N.device)
        gradient_NV[rows, local_N] += gradient_N.masked_fill(absent_N, 0.0)
        return gradient_NV, None, None, None


@dataclass(frozen=True, kw_only=True)
class SmoothedCrossEntropy(CrossEntropy):
    smoothing: float

    def _measure(self, head: Head, hidden_NE: Tensor, targets_N: Tensor) -> Tensor:
        logits_NV = head.project(hidden_NE).float()
        function: Any = _AboveMean
        above_N: Tensor = function.apply(logits_NV, targets_N, head.vocabulary_size, head.group)
        return head.nll(logits_NV, targets_N) + self.smoothing * above_N
