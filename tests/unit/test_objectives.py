"""Objectives against torch's own losses, on one rank and with the vocabulary spread over several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sft.config.objective import ObjectiveSettings
from sft.model.collectives import SingleRank
from sft.objective.choose import objective_of
from sft.objective.cross_entropy import CrossEntropy
from sft.objective.interface import BatchFacts, Head, Labels, Objective
from sft.objective.label_smoothing import SmoothedCrossEntropy
from tests.threads import run_together

VOCABULARY, HIDDEN, TOKENS = 131, 16, 23  # no number of ranks divides the vocabulary


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def labels_of(count: int = TOKENS) -> Labels:
    return Labels(
        kept_N=torch.arange(count),
        targets_N=torch.randint(0, VOCABULARY, (count,)),
        weights_N=torch.rand(count),
        documents_N=torch.arange(count) // 6,
        scale_1=torch.ones(1),
    )


def head_of(weight_VE: Tensor, group: Any, at_once: int = 4096) -> Head:
    """This rank's rows of the projection, filled up with rows that must not matter."""
    rows = -(-VOCABULARY // group.size)
    padded = functional.pad(weight_VE, (0, 0, 0, rows * group.size - VOCABULARY), value=9.0)
    own = nn.Parameter(padded[group.rank * rows : (group.rank + 1) * rows].clone())
    return Head(
        project=lambda hidden_NE: hidden_NE @ own.T,
        trained=[own],
        vocabulary_size=VOCABULARY,
        group=group,
        tokens_at_once=at_once,
    )


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("at_once", [5, 4096])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_smoothed_labels_are_those_of_torch(size, at_once, smoothing):
    weight_VE, hidden_NE, labels = torch.randn(VOCABULARY, HIDDEN), torch.randn(TOKENS, HIDDEN), labels_of()
    expected_VE, expected_NE = weight_VE.clone().requires_grad_(), hidden_NE.clone().requires_grad_()
    losses = functional.cross_entropy(
        expected_NE @ expected_VE.T, labels.targets_N, reduction="none", label_smoothing=smoothing
    )
    expected = (losses * labels.weights_N).sum()
    expected.backward()

    def on_a_rank(group: Any) -> tuple[Tensor, Tensor, Tensor]:
        head, mine_NE = head_of(weight_VE, group, at_once), hidden_NE.clone().requires_grad_()
        loss = objective_of(ObjectiveSettings(label_smoothing=smoothing)).loss(head, mine_NE, labels)
        loss.backward()
        assert head.trained[0].grad is not None
        assert mine_NE.grad is not None
        return loss.detach(), head.trained[0].grad, mine_NE.grad

    results = run_together(size, on_a_rank)
    for loss, _, _ in results:
        torch.testing.assert_close(loss, expected.detach())
    gradient_VE = torch.cat([gradient for _, gradient, _ in results])
    torch.testing.assert_close(gradient_VE[:VOCABULARY], expected_VE.grad)
    assert not gradient_VE[VOCABULARY:].any()  # padding learns nothing
    torch.testing.assert_close(sum(gradient for _, _, gradient in results), expected_NE.grad)


@torch.no_grad()
def test_smoothing_leaves_the_figures_of_a_validation_alone():
    head, hidden_NE, labels = (
        head_of(0.1 * torch.randn(VOCABULARY, HIDDEN), SingleRank(), 7),
        torch.randn(TOKENS, HIDDEN),
        labels_of(),
    )
    plain, smoothed = CrossEntropy(), SmoothedCrossEntropy(smoothing=0.5)
    sums = plain.sums(head, hidden_NE, labels)
    torch.testing.assert_close(smoothed.sums(head, hidden_NE, labels), sums)
    figures = plain.figures(sums.tolist())
    nll = functional.cross_entropy(head.project(hidden_NE), labels.targets_N, reduction="none")
    mean = float((nll * labels.weights_N).sum() / labels.weights_N.sum())
    assert figures["val_loss"] == pytest.approx(mean, rel=1e-6)
    assert figures["val_perplexity"] == pytest.approx(np.exp(mean), rel=1e-6)
    assert smoothed.loss(head, hidden_NE, labels) != plain.loss(head, hidden_NE, labels)


# ---- an objective over pairs of documents, to show that the interface carries one


@dataclass(frozen=True, kw_only=True)
class PairLoss(Objective):
    """DPO: documents 2k and 2k + 1 are the chosen and the rejected answer to one question."""

    beta: float
    reference: np.ndarray  # log-probability of each document's answer under the frozen model

    num_sums = 2  # loss, pairs

    @property
    def role_weights(self) -> np.ndarray:
        return CrossEntropy().role_weights

    def normaliser(self, facts: BatchFacts) -> float:
        return facts.num_documents / 2

    def loss(self, head: Head, hidden_NE: Tensor, labels: Labels) -> Tensor:
        nll_N = head.nll(head.project(hidden_NE), labels.targets_N)
        numbers_D, document_N = torch.unique(labels.documents_N, return_inverse=True)
        gained_D = torch.zeros(len(numbers_D)).index_add(0, document_N, -nll_N)
        gained_D = gained_D - torch.from_numpy(self.reference)[numbers_D].float()
        return -functional.logsigmoid(self.beta * (gained_D[0::2] - gained_D[1::2])).sum()

    def sums(self, head: Head, hidden_NE: Tensor, labels: Labels) -> Tensor:
        pairs = len(torch.unique(labels.documents_N)) / 2
        return torch.tensor([float(self.loss(head, hidden_NE, labels).detach()), pairs], dtype=torch.float64)

    def figures(self, sums: Sequence[float]) -> Mapping[str, float]:
        return {"val_pair_loss": sums[0] / sums[1]}


def test_a_loss_over_pairs_of_documents_fits():
    weight_VE = torch.randn(VOCABULARY, HIDDEN)
    head, hidden_NE = head_of(weight_VE, SingleRank()), torch.randn(24, HIDDEN)
    labels, reference = labels_of(24), np.array([-20.0, -31.0, -25.0, -22.0])  # four documents of six tokens
    objective = PairLoss(beta=0.3, reference=reference)
    log_probabilities = functional.log_softmax(hidden_NE @ weight_VE.T, -1)
    own = log_probabilities[torch.arange(24), labels.targets_N].view(4, 6).sum(1).double()
    margins = [0.3 * ((own[i] - reference[i]) - (own[i + 1] - reference[i + 1])) for i in (0, 2)]
    expected = sum(float(-functional.logsigmoid(margin)) for margin in margins)
    assert float(objective.loss(head, hidden_NE, labels).detach()) == pytest.approx(expected, rel=1e-5)
    facts = BatchFacts(total_weight=24.0, num_documents=4)
    figures = objective.figures(objective.sums(head, hidden_NE, labels).tolist())
    assert figures["val_pair_loss"] == pytest.approx(expected / objective.normaliser(facts), rel=1e-5)
    objective.loss(head, hidden_NE, labels).backward()
    assert head.trained[0].grad is not None
