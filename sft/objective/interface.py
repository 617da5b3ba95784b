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
    """Of a micro-batch. N counts the places whose next token has a weight."""

    kept_N: Tensor  # their places in the row
    targets_N: Tensor  # the next tokens
    weights_N: Tensor
    documents_N: Tensor  # the number of the document that each belongs to, in the data set
    scale_1: Tensor  # turns a sum over this micro-batch into its part of the engine's mean


@dataclass(frozen=True, kw_only=True)
class BatchFacts:
    """Of a global batch, known on every process before anything is computed."""

    total_weight: float
    num_documents: int


@dataclass(frozen=True, kw_only=True)
class Head:
    """The model's last projection, on this tensor-parallel rank."""

    project: Callable[[Tensor], Tensor]  # hidden_NE to this rank's logits_NV
    trained: Sequence[Tensor]  # its parameters that are trained
    vocabulary_size: int
    group: TensorGroup
    tokens_at_once: int  # logits of so many tokens are in memory
    likelihood: Likelihood = negative_log_likelihood

    def nll(self, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        """Negative log-likelihoods, in float32."""
        return self.likelihood(logits_NV, targets_N, self.vocabulary_size, self.group)

    def most_likely(self, logits_NV: Tensor) -> Tensor:
        return most_likely(logits_NV, self.vocabulary_size, self.group)


class Objective(ABC):
    """Frozen: what it keeps between micro-batches are the sums, which the engine adds up."""

    num_sums: int  # of a validation

    @property
    @abstractmethod
    def role_weights(self) -> np.ndarray:
        """The weight of a token by its role, see `tokenize_data.chat`."""

    @abstractmethod
    def normaliser(self, facts: BatchFacts) -> float:
        """What a sum over all micro-batches of a global batch is divided by."""

    @abstractmethod
    def loss(self, head: Head, hidden_NE: Tensor, labels: Labels) -> Tensor:
        """The sum over this micro-batch, to be differentiated. The engine multiplies it by `labels.scale_1`."""

    @abstractmethod
    def sums(self, head: Head, hidden_NE: Tensor, labels: Labels) -> Tensor:
        """`num_sums` numbers in float64 on the CPU; their totals over a validation set become `figures`."""

    @abstractmethod
    def figures(self, sums: Sequence[float]) -> Mapping[str, float]:
        """Of a validation, by name."""
