"""Turns documents into stage inputs: one packed row per micro-batch, without tokens that predict nothing. A document
of n tokens takes n - 1 positions, each of which predicts the next token. kept_N are the positions that count in the
loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from sft.model.dropout import document_keys
from sft.objective.interface import BatchFacts, Labels, Objective
from sft.plan.packing import BatchPlan, plan_batch
from tokenize_data.reader import Document, ShardReader

MicroBatch = tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]  # (inputs, `Labels`)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The plan of one iteration's documents, the same on every process."""

    numbers: np.ndarray  # lengths of the documents
    plan: BatchPlan
    total_weight: float
    num_trained: int

    @property
    def num_tokens(self) -> int:
        """The number of computed positions."""
        return self.plan.num_tokens


class Feed:
    """Makes micro-batches from documents, for data-parallel rank `replica` of `replicas`."""

    def __init__(
        self,
        reader: ShardReader,
        *,
        capacity: int,
        replicas: int,
        replica: int,
        objective: Objective,
        multiple: int = 1,
        pack: bool = True,
        keyed: bool = False,
    ) -> None:
        """With `keyed`, the upper bits of training positions hold their documents' keys, which dropout uses."""
        self._keyed = keyed
        self._reader, self._capacity, self._pack = reader, capacity, pack
        self._replicas, self._replica, self._multiple = replicas, replica, multiple
        self._objective, self._role_weights = objective, objective.role_weights

    def plan(self, numbers: np.ndarray) -> Batch:
        lengths = self._reader.lengths[numbers].astype(np.int64) - 1
        plan = plan_batch(lengths.tolist(), self._capacity, self._replicas, self._pack)
        trained = int(self._reader.trained[numbers].sum())
        return Batch(numbers=numbers, plan=plan, total_weight=self._total_weight(numbers, trained), num_trained=trained)

    def micro_batches(self, batch: Batch, counted: int | None = None) -> Iterator[MicroBatch]:
        """This replica's rows. Losses are scaled so that the engine's mean over rows and replicas is the mean over
        trained tokens.
        """
        facts = BatchFacts(total_weight=batch.total_weight, num_documents=len(batch.numbers))
        normaliser = max(self._objective.normaliser(facts), 1e-30)
        scale = torch.tensor([batch.plan.num_micro_batches * self._replicas / normaliser], dtype=torch.float32)
        keys = document_keys(batch.numbers.tobytes(), len(batch.numbers)) if self._keyed else [0] * len(batch.numbers)
        for row in batch.plan.rows[self._replica]:
            documents = [self._reader[int(batch.numbers[position])] for position in row]
            counts = [counted is None or position < counted for position in row]
            numbers = [int(batch.numbers[position]) for position in row]
            inputs, labels = make_row(
                documents, self._role_weights, self._multiple, counts, [keys[position] for position in row], numbers
            )
            yield inputs, Labels(*labels, scale)

    def row_lengths(self, batch: Batch) -> list[list[int]]:
        """The document lengths in each of this replica's rows, including the padding document."""
        lengths = self._reader.lengths[batch.numbers].astype(np.int64) - 1
        rows = [[int(lengths[position]) for position in row] for row in batch.plan.rows[self._replica]]
        return [[*row, padding] if (padding := -sum(row) % self._multiple) else row for row in rows]

    def plan_for_validation(self, numbers: np.ndarray, replicas: int) -> tuple[Batch, Iterator[MicroBatch]]:
        """Plan a validation. Some documents are repeated with weight 0, so that all replicas get the same number."""
        spare = -len(numbers) % replicas
        batch = self.plan(np.concatenate([numbers, np.resize(numbers, spare)]))
        return batch, self.micro_batches(batch, counted=len(numbers))

    def _total_weight(self, numbers: np.ndarray, trained: int) -> float:
        if np.count_nonzero(self._role_weights) == 1:  # answer tokens only, as counted in the index
            return float(trained)
        return float(
            sum(_weights(self._reader[int(number)], self._role_weights).sum(dtype=np.float64) for number in numbers)
        )


def make_row(
    documents: Sequence[Document],
    role_weights: np.ndarray,
    multiple: int = 1,
    counts: Sequence[bool] | None = None,
    keys: Sequence[int] | None = None,
    numbers: Sequence[int] | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Returns ((ids_1T, positions_1T), (kept_N, targets_N, weights_N, documents_N)), padded to a `multiple` of
    positions by a document with weight 0.
    """
    ids = [document.ids[:-1] for document in documents]
    positions = [np.arange(len(part)) + (key << 32) for part, key in zip(ids, keys or repeat(0), strict=False)]
    targets = np.concatenate([document.ids[1:] for document in documents])
    weights = np.concatenate(
        [
            _weights(document, role_weights) * np.float32(count)
            for document, count in zip(documents, counts or repeat(True), strict=False)
        ]
    )
    belongs = np.repeat(np.array(numbers or range(len(documents)), np.int64), [len(part) for part in ids])
    kept = np.flatnonzero(weights)
    padding = -sum(map(len, ids)) % multiple
    if padding:
        ids.append(np.zeros(padding, ids[0].dtype))
        positions.append(np.arange(padding))
    inputs = (_row(np.concatenate(ids)), _row(np.concatenate(positions)))
    return inputs, (
        torch.from_numpy(kept),
        torch.from_numpy(targets[kept].astype(np.int64)),
        torch.from_numpy(weights[kept]),
        torch.from_numpy(belongs[kept]),
    )


def _weights(document: Document, role_weights: np.ndarray) -> np.ndarray:
    weights: np.ndarray = role_weights[document.roles()[1:]]
    return weights


def _row(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))[None]
