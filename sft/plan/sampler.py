"""Which documents make an iteration: a function of documents, mix, global batch, seed and iteration, of nothing else.

The documents form one endless stream, a new permutation for each epoch. Iteration k takes the k-th stretch of
`global_batch` from it, so the last batch of an epoch is filled from the next permutation, and resuming is a seek.

Where data sets are mixed, each is an endless stream of its own, and an epoch takes the next stretch of each. So every
document has its turn, also where an epoch takes only a part of a data set.

Shards say how they are shuffled. numpy permutes all documents of an epoch at once. For data sets so large that this
takes seconds and gigabytes, `shuffle.py` computes what an iteration needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from sft.plan.mixing import MixPart
from sft.plan.shuffle import shuffled
from tokenize_data.errors import UserError
from tokenize_data.manifest import FEISTEL, PERMUTATION

_AT_ONCE = 2**15  # documents that are counted at once


def num_iterations(num_documents: int, epochs: float, global_batch: int) -> int:
    """ceil(epochs * documents / global batch), computed exactly for decimals such as 0.1."""
    if num_documents < 1 or epochs <= 0 or global_batch < 1:
        raise UserError(
            f"{num_documents} documents, {epochs} epochs, global_batch {global_batch}: each must be above 0"
        )
    return -(-Fraction(str(epochs)) * num_documents // global_batch)


class Sampler:
    """Selects the documents of each iteration. Of numpy's permutations it caches the last two, which is all that an
    iteration needs.
    """

    def __init__(
        self,
        num_documents: int,
        global_batch: int,
        seed: int,
        mix: Sequence[MixPart] = (),
        is_in_order: bool = False,
        shuffle: str = PERMUTATION,
    ) -> None:
        """`is_in_order`: an epoch takes one data set after another, each shuffled."""
        if num_documents < 1 or global_batch < 1:
            raise UserError(f"{num_documents} documents, global_batch {global_batch}: each must be above 0")
        assert not mix or sum(part.documents for part in mix) == num_documents
        self.num_documents, self.global_batch, self.seed = num_documents, global_batch, seed
        self.mix, self._is_in_order, self._is_computed = tuple(mix), is_in_order, shuffle == FEISTEL
        self._is_plain = (not is_in_order or not mix) and all(part.is_whole for part in mix)
        self._permutation = lru_cache(maxsize=2)(self._permute)
        self._edges = np.cumsum([0, *(part.documents for part in mix)])
        self._edges_in_epoch = np.cumsum([0, *(part.per_epoch for part in mix)])

    def documents(self, iteration: int) -> np.ndarray:
        """The document numbers of an iteration, counted from 0. A document may occur twice where epochs meet."""
        first = iteration * self.global_batch
        parts = []
        while first < (iteration + 1) * self.global_batch:
            epoch, at = divmod(first, self.num_documents)
            part = self._stretch(epoch, at, min(at + (iteration + 1) * self.global_batch - first, self.num_documents))
            parts.append(part)
            first += len(part)
        return np.concatenate(parts)

    def epoch(self, iteration: int) -> float:
        """The number of epochs before this iteration."""
        return iteration * self.global_batch / self.num_documents

    def count(self, numbers: np.ndarray) -> np.ndarray:
        """The number of these documents in each data set of the mix."""
        places = np.searchsorted(self._edges, numbers, side="right") - 1
        counts: np.ndarray = np.bincount(places, minlength=len(self.mix))
        return counts

    def seen(self, iteration: int) -> np.ndarray:
        """The number of documents of each data set before this iteration."""
        epochs, rest = divmod(iteration * self.global_batch, self.num_documents)
        found = np.array([part.per_epoch for part in self.mix], dtype=np.int64) * epochs
        for start in range(0, rest, _AT_ONCE):
            found += self.count(self._stretch(epochs, start, min(start + _AT_ONCE, rest)))
        return found

    def _stretch(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """The documents at these positions of an epoch."""
        if not self._is_computed:
            return self._permutation(epoch)[start:stop]
        positions = np.arange(start, stop)
        if self._is_plain or not self._is_in_order:
            positions = shuffled(self.num_documents, (self.seed, epoch), positions)
        if self._is_plain:
            return positions.astype(np.uint32)
        found = np.empty(len(positions), np.uint32)
        places = np.searchsorted(self._edges_in_epoch, positions, side="right") - 1
        for number in np.unique(places):
            part, chosen = self.mix[number], np.flatnonzero(places == number)
            at = epoch * part.per_epoch + positions[chosen] - self._edges_in_epoch[number]
            for time in np.unique(at // part.documents):
                now = at // part.documents == time
                order = shuffled(part.documents, (self.seed, int(number), int(time), 1), at[now] % part.documents)
                found[chosen[now]] = order + self._edges[number]
        return found

    def _permute(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng((self.seed, epoch))
        if self._is_plain:
            return random.permutation(self.num_documents).astype(np.uint32)
        chosen = np.concatenate([self._of_part(number, epoch) for number in range(len(self.mix))])
        return chosen if self._is_in_order else random.permutation(chosen)

    def _of_part(self, number: int, epoch: int) -> np.ndarray:
        """The next documents of a data set's own stream, which is permuted again for each pass."""
        part, first = self.mix[number], int(self._edges[number])
        at, last, found = epoch * part.per_epoch, (epoch + 1) * part.per_epoch, []
        while at < last:
            time, offset = divmod(at, part.documents)
            order = np.random.default_rng((self.seed, number, time, 1)).permutation(part.documents)
            found.append(order[offset : offset + last - at])
            at += len(found[-1])
        return (np.concatenate(found) + first).astype(np.uint32)
