"""Which documents make an iteration: a function of (documents, global batch, seed, iteration), and of nothing else.

The documents form one endless stream, a new permutation for each epoch. Iteration k takes the k-th stretch of
`global_batch` from it, so the last batch of an epoch is filled from the next permutation, and resuming is a seek.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

import numpy as np

from tokenize_data.errors import UserError


def num_iterations(num_documents: int, epochs: float, global_batch: int) -> int:
    """ceil(epochs * documents / global batch), exactly: no rounding of 0.1 and its like."""
    if num_documents < 1 or epochs <= 0 or global_batch < 1:
        raise UserError(
            f"{num_documents} documents, {epochs} epochs, global_batch {global_batch}: each must be above 0"
        )
    return -(-Fraction(str(epochs)) * num_documents // global_batch)


class Sampler:
    """The documents of each iteration. Keeps the last two permutations, which are all that an iteration needs."""

    def __init__(self, num_documents: int, global_batch: int, seed: int) -> None:
        if num_documents < 1 or global_batch < 1:
            raise UserError(f"{num_documents} documents, global_batch {global_batch}: each must be above 0")
        self.num_documents, self.global_batch, self.seed = num_documents, global_batch, seed
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def documents(self, iteration: int) -> np.ndarray:
        """The document numbers of iteration `iteration`, counted from 0. A document may be there twice where epochs
        meet.
        """
        first = iteration * self.global_batch
        parts = []
        while first < (iteration + 1) * self.global_batch:
            epoch, at = divmod(first, self.num_documents)
            part = self._permutation(epoch)[at : at + (iteration + 1) * self.global_batch - first]
            parts.append(part)
            first += len(part)
        return np.concatenate(parts)

    def epoch(self, iteration: int) -> float:
        """How many times the data have been seen before this iteration."""
        return iteration * self.global_batch / self.num_documents

    def _permute(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_documents).astype(np.uint32)
