"""Statistics of an iteration's rows for a capacity and a number of replicas, from packing a few iterations' document
lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sft.plan.packing import plan_batch


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Means over sampled iterations. A micro-batch takes as long as its fullest replica."""

    micro_batches: int
    row_tokens: float  # of the fullest replica's rows
    most_trained: float  # tokens of a row
    fill: float
    balance: float
    tokens: float  # of an iteration
    document_tokens: float  # mean length of a token's document


class Batches:
    """Document lengths by iteration, in positions: a document of n tokens has n - 1."""

    def __init__(self, lengths: Sequence[Sequence[int]], trained: Sequence[Sequence[int]] | None = None) -> None:
        self._lengths = [[int(length) for length in iteration] for iteration in lengths]
        self._trained = (
            self._lengths if trained is None else [[int(count) for count in iteration] for iteration in trained]
        )
        self.rows = lru_cache(maxsize=None)(self._rows)

    @classmethod
    def all_alike(cls, num_documents: int, length: int, trained_share: float = 1.0) -> Batches:
        return cls([[length] * num_documents], [[max(1, round(length * trained_share))] * num_documents])

    @property
    def longest(self) -> int:
        return max(max(iteration) for iteration in self._lengths)

    def _rows(self, capacity: int, replicas: int) -> Rows:
        plans = [plan_batch(lengths, capacity, replicas) for lengths in self._lengths]
        lengths = np.concatenate([np.asarray(iteration, np.float64) for iteration in self._lengths])
        micro_batches = max(1, round(float(np.mean([plan.num_micro_batches for plan in plans]))))
        tokens = float(np.mean([plan.num_tokens for plan in plans]))
        balance = float(np.mean([plan.balance for plan in plans]))
        most = 0
        for plan, counts in zip(plans, self._trained, strict=True):
            most = max(most, max(sum(counts[i] for i in row) for replica in plan.rows for row in replica))
        return Rows(
            micro_batches=micro_batches,
            row_tokens=tokens / replicas / micro_batches / balance,
            most_trained=float(most),
            fill=float(np.mean([plan.fill for plan in plans])),
            balance=balance,
            tokens=tokens,
            document_tokens=float((lengths**2).sum() / lengths.sum()),
        )
