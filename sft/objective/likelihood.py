"""The loss: a weighted sum of the tokens' negative log-likelihoods, with or without a tensor-parallel vocabulary.

hidden_NE are the hidden states of N tokens, targets_N their next tokens, weights_N their weights. Logits are never
gathered over ranks. They exist for one chunk of tokens at a time: each chunk's gradients follow its loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from sft.model.collectives import TensorGroup

Likelihood = Callable[[Tensor, Tensor, int, TensorGroup], Tensor]  # same signature as `negative_log_likelihood`


class _VocabularyParallel(Function):
    """Compute the negative log-likelihood of each token from this rank's logits."""

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


class _ChunkedSum(Function):
    """Compute sum(weight * nll) and its gradients in one pass, freeing each chunk's logits before the next chunk."""

    @staticmethod
    def forward(
        context: Any,
        measure: Callable[[Tensor, Tensor], Tensor],
        at_once: int,
        hidden_NE: Tensor,
        targets_N: Tensor,
        weights_N: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        gradient_NE = torch.empty_like(hidden_NE)
        sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in trained]
        measured = []
        chunks = zip(*(t.split(at_once) for t in (hidden_NE, targets_N, weights_N, gradient_NE)), strict=True)
        for hidden_CE, targets_C, weights_C, gradient_CE in chunks:
            with torch.enable_grad():
                hidden_CE = hidden_CE.detach().requires_grad_()
                nll_C = measure(hidden_CE, targets_C)
                found = torch.autograd.grad(nll_C, [hidden_CE, *trained], weights_C)
            gradient_CE.copy_(found[0])
            for total, gradient in zip(sums, found[1:], strict=True):
                total += gradient
            measured.append(nll_C.detach())
            del nll_C, found
        context.save_for_backward(
            gradient_NE, *(total.to(parameter.dtype) for total, parameter in zip(sums, trained, strict=True))
        )
        return (torch.cat(measured) * weights_N).sum()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient_NE, *sums = (saved * gradient for saved in context.saved_tensors)
        return None, None, gradient_NE, None, None, *sums


def weighted_sum(
    measure: Callable[[Tensor, Tensor], Tensor],
    trained: Sequence[Tensor],
    hidden_NE: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    at_once: int,
) -> Tensor:
    """Return sum(weight * nll). `measure(hidden, targets)` returns the nll of a chunk, and `trained` lists the
    parameters that it uses.
    """
    if len(targets_N) <= at_once:
        return (measure(hidden_NE, targets_N) * weights_N).sum()
    function: Any = _ChunkedSum
    result: Tensor = function.apply(measure, at_once, hidden_NE, targets_N, weights_N, *trained)
    return result


def negative_log_likelihood(logits_NV: Tensor, targets_N: Tensor, vocabulary_size: int, group: TensorGroup) -> Tensor:
    """Return nll_N in float32. With several ranks, `logits_NV` holds this rank's columns, padding included."""
    logits_NV = logits_NV.float()
    if group.size == 1:
        return F.cross_entropy(logits_NV, targets_N, reduction="none")
    start = group.rank * logits_NV.size(-1)
    function: Any = _VocabularyParallel
    nll_N: Tensor = function.apply(without_padding(logits_NV, start, vocabulary_size), targets_N, start, group)
    return nll_N


def most_likely(logits_NV: Tensor, vocabulary_size: int, group: TensorGroup) -> Tensor:
    """Return ids_N of the largest logits. The smallest id wins a tie."""
    if group.size == 1:
        return logits_NV.argmax(-1)
    start = group.rank * logits_NV.size(-1)
    best_N, ids_N = without_padding(logits_NV.float(), start, vocabulary_size).max(-1)
    is_best_N = best_N == group.maximum(best_N)
    return -group.maximum(torch.where(is_best_N, -(ids_N + start), torch.full_like(ids_N, -(2**62))))


def without_padding(logits_NV: Tensor, start: int, vocabulary_size: int) -> Tensor:
    """Mask the columns past the vocabulary, so that they are never chosen and get no gradient."""
    real = vocabulary_size - start
    if real >= logits_NV.size(-1):
        return logits_NV
    padding_V = torch.arange(logits_NV.size(-1), device=logits_NV.device) >= real
    return logits_NV.masked_fill(padding_V, torch.finfo(logits_NV.dtype).min)
