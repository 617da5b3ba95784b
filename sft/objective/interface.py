"""The interface between engine and objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from sft.model.collectives import TensorGroup
from sft.objective.likelihood import Likelihood, most_likely, negative_log_likelihood


class Labels(NamedTuple):
    """The labels of a micro-batch. N counts the positions whose next token has a weight."""

    kept_N: Tensor  # their positions in the row
    targets_N: Tensor  # the next tokens
    weights_N: Tensor
    documents_N: Tensor  # the index, in the data set, of the document that each belongs to
    scale_1: Tensor  # scales the sum over this micro-batch to its share of the engine's mean


@dataclass(frozen=True, kw_only=True)
class BatchFacts:
    """Totals of a global batch, which every process knows before the forward pass."""

    total_weight: float
    num_documents: int


@dataclass(frozen=True, kw_only=True)
class Head:
    """The projection to the vocabulary on this tensor-parallel rank."""

    project: Callable[[Tensor], Tensor]  # maps hidden_NE to this rank's logits_NV
    trained: Sequence[Tensor]  # its trainable parameters
    vocabulary_size: int
    group: TensorGroup
    tokens_at_once: int  # logits are computed for at most this many tokens at once
    likelihood: Likelihood = negative_log_likelihood

    def nll(self, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        """Return the negative log-likelihood of each token, in float32."""
        return self.likelihood(logits_NV, targets_N, self.vocabulary_size, self.group)

    def most_likely(self, logits_NV: Tensor) -> Tensor:
        return most_likely(logits_NV, self.vocabulary_size, self.group)


class Objective(ABC):
    """A loss and its validation metrics. It holds no state between micro-batches: the engine adds up the sums."""

    num_sums: int  # length of what `sums` returns

    @property
    @abstractmethod
    def role_weights(self) -> np.ndarray:
        """The loss weight of each role, see `tokenize_data.chat`."""

    @abstractmethod
    def normaliser(self, facts: BatchFacts) -> float:
        """Return the number that divides the sum over all micro-batches of a global batch."""

    @abstractmethod
    def loss(self, head: Head, hidden_NE: Tensor, labels: Labels) -> Tensor:
        """Return the loss summed over this micro-batch. The engine scales it by `labels.scale_1`."""

    @abstractmethod
    def sums(self, head: Head, hidden_NE: Tensor, labels: Labels) -> Tensor:
        """Return `num_sums` float64 numbers on the CPU. `figures` gets their totals over the validation set."""

    @abstractmethod
    def figures(self, sums: Sequence[float]) -> Mapping[str, float]:
        """Return the validation metrics by name."""
