"""The loss: a weighted sum of the tokens' negative log-likelihoods, the vocabulary spread over tensor-parallel ranks or not.

hidden_NE are hidden states of N tokens, targets_N their next tokens, weights_N what each counts. Logits are never gathered.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from sft.model.collectives import TensorGroup


class _VocabularyParallel(Function):
    """Negative log-likelihood of each token, from this rank's logits."""

    @staticmethod
    def forward(context: Any, logits_NV: Tensor, targets_N: Tensor, start: int, group: TensorGroup) -> Tensor:
        largest_N = group.maximum(logits_NV.amax(-1))
        exponents_NV = (logits_NV - largest_N[:, None]).exp_()
        sums_N = group.sum(exponents_NV.sum(-1))
        local_N = targets_N - start
        absent_N = (local_N < 0) | (local_N >= logits_NV.size(-1))
        local_N = local_N.masked_fill(absent_N, 0)
        chosen_N = group.sum(logits_NV.gather(-1, local_N[:, None])[:, 0].masked_fill(absent_N, 0.0))
        context.save_for_backward(exponents_NV.div_(sums_N[:, None]), local_N, absent_N)
        return sums_N.log() + largest_N - chosen_N

    @staticmethod
    def backward(context: Any, gradient_N: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities_NV, local_N, absent_N = context.saved_tensors
        rows = torch.arange(local_N.numel(), device=local_N.device)
        probabilities_NV[rows, local_N] -= (~absent_N).to(probabilities_NV.dtype)
        return probabilities_NV.mul_(gradient_N[:, None]), None, None, None


def negative_log_likelihood(logits_NV: Tensor, targets_N: Tensor, vocabulary_size: int, group: TensorGroup) -> Tensor:
    """nll_N in float32. With several ranks, `logits_NV` are this rank's columns, padding past the vocabulary among them."""
    logits_NV = logits_NV.float()
    if group.size == 1:
        return F.cross_entropy(logits_NV, targets_N, reduction="none")
    start = group.rank * logits_NV.size(-1)
    function: Any = _VocabularyParallel
    nll_N: Tensor = function.apply(without_padding(logits_NV, start, vocabulary_size), targets_N, start, group)
    return nll_N


def most_likely(logits_NV: Tensor, vocabulary_size: int, group: TensorGroup) -> Tensor:
    """ids_N with the largest logit, the smallest id where several have it."""
    if group.size == 1:
        return logits_NV.argmax(-1)
    start = group.rank * logits_NV.size(-1)
    best_N, ids_N = without_padding(logits_NV.float(), start, vocabulary_size).max(-1)
    is_best_N = best_N == group.maximum(best_N)
    return -group.maximum(torch.where(is_best_N, -(ids_N + start), torch.full_like(ids_N, -(2**62))))


def without_padding(logits_NV: Tensor, start: int, vocabulary_size: int) -> Tensor:
    """Columns past the vocabulary never win, and never learn."""
    real = vocabulary_size - start
    if real >= logits_NV.size(-1):
        return logits_NV
    padding_V = torch.arange(logits_NV.size(-1), device=logits_NV.device) >= real
    return logits_NV.masked_fill(padding_V, torch.finfo(logits_NV.dtype).min)
