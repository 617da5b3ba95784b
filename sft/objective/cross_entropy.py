"""The weighted mean of the tokens' negative log-likelihoods over a global batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sft.objective.interface import BatchFacts, Head, Labels, Objective
from sft.objective.likelihood import weighted_sum
from tokenize_data.rendered import ASSISTANT, SYSTEM, USER

_NUM_ROLES = 4
_MOST_NATS = 700.0  # exp() of a larger value overflows


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Objective):
    loss_mask: float = 0.0  # weight of user and system tokens

    num_sums = 4  # weighted nll, weight, correct tokens, tokens

    @property
    def role_weights(self) -> np.ndarray:
        weights = np.zeros(_NUM_ROLES, np.float32)
        weights[[SYSTEM, USER]] = self.loss_mask
        weights[ASSISTANT] = 1.0
        return weights

    def normaliser(self, facts: BatchFacts) -> float:
        return facts.total_weight

    def loss(self, head: Head, hidden_NE: Tensor, labels: Labels) -> Tensor:
        measure = partial(self._measure, head)
        return weighted_sum(measure, head.trained, hidden_NE, labels.targets_N, labels.weights_N, head.tokens_at_once)

    def _measure(self, head: Head, hidden_NE: Tensor, targets_N: Tensor) -> Tensor:
        """Return the loss of each token, before weighting."""
        return head.nll(head.project(hidden_NE), targets_N)

    def sums(self, head: Head, hidden_NE: Tensor, labels: Labels) -> Tensor:
        parts = (hidden_NE, labels.targets_N, labels.weights_N)
        chunks = zip(*(part.split(head.tokens_at_once) for part in parts), strict=True)
        return torch.stack([self._sums_of_chunk(head, *chunk) for chunk in chunks]).sum(0)

    def _sums_of_chunk(self, head: Head, hidden_NE: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
        logits_NV = head.project(hidden_NE)
        nll_N = head.nll(logits_NV, targets_N)
        right_N = head.most_likely(logits_NV) == targets_N
        fully_N = weights_N == 1  # answers; tokens with a lower weight do not count towards accuracy
        sums = [(nll_N.double() * weights_N).sum(), weights_N.double().sum(), (right_N & fully_N).sum(), fully_N.sum()]
        return torch.stack([number.double().cpu() for number in sums])

    def figures(self, sums: Sequence[float]) -> Mapping[str, float]:
        weighted, weight, right, tokens = sums
        loss = weighted / max(weight, 1e-30)
        return {
            "val_loss": loss,
            "val_perplexity": math.exp(min(loss, _MOST_NATS)),
            "val_accuracy": right / max(tokens, 1.0),
        }
