"""The loss function that DeepSpeed calls with the last stage's output: the objective over one micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor

from sft.model.collectives import TensorGroup
from sft.model.stage import Stage
from sft.objective.interface import Head, Labels, Objective
from sft.objective.likelihood import Likelihood, negative_log_likelihood


class MicroBatchLoss:
    """Computes the loss in training. In validation it also adds up the objective's sums."""

    def __init__(
        self,
        objective: Objective,
        stage: Stage,
        vocabulary_size: int,
        group: TensorGroup,
        tokens_at_once: int,
        likelihood: Likelihood = negative_log_likelihood,
    ) -> None:
        self._objective, self._stage, self._vocabulary_size, self._group = objective, stage, vocabulary_size, group
        self.tokens_at_once, self._likelihood = tokens_at_once, likelihood
        self.sums = torch.zeros(objective.num_sums, dtype=torch.float64)
        self.losses: list[Tensor] = []  # since it was cleared, to find one that is not finite

    def __call__(self, hidden_RTE: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
        known = Labels(*labels)
        head, hidden_NE = self._head(), self._stage.before_logits(hidden_RTE, known.kept_N)
        if self._stage.training:
            total = self._objective.loss(head, hidden_NE, known)
        else:
            sums = self._objective.sums(head, hidden_NE, known)
            self.sums += sums
            total = sums[0].to(hidden_NE.device, torch.float32)
        result = total * known.scale_1[0]
        self.losses.append(result.detach())
        return result

    def _head(self) -> Head:
        head = self._stage.head
        assert head is not None
        return Head(
            project=head.logits,
            trained=[parameter for parameter in head.head.parameters() if parameter.requires_grad],
            vocabulary_size=self._vocabulary_size,
            group=self._group,
            tokens_at_once=self.tokens_at_once,
            likelihood=self._likelihood,
        )
