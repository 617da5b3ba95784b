"""Packs the documents of an iteration into rows: none is cut, none is longer than a row, with as few rows as possible,
balanced over replicas.

A row is what one data-parallel replica computes in one micro-batch: several documents one behind the other, at most
`micro_batch * seq` tokens. Every replica gets the same number of rows. Packing changes nothing but speed: attention
never crosses
documents, and the loss is a sum over the whole iteration.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokenize_data.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The rows of one iteration. `rows[r][m]` are indices of the documents that replica r computes in micro-batch m."""

    rows: tuple[tuple[tuple[int, ...], ...], ...]
    capacity: int
    num_tokens: int
    balance: float  # mean over maximum of tokens per replica: 1 means no waiting

    @property
    def num_micro_batches(self) -> int:
        return len(self.rows[0])

    @property
    def fill(self) -> float:
        """The share of the rows' capacity that holds tokens."""
        return self.num_tokens / (len(self.rows) * self.num_micro_batches * self.capacity)


def plan_batch(lengths: Sequence[int], capacity: int, replicas: int = 1, pack: bool = True) -> BatchPlan:
    """Pack documents of these lengths. With `pack` false, each document is a row."""
    lengths = [int(length) for length in lengths]
    if replicas < 1 or len(lengths) < replicas:
        count = f"{len(lengths)} documents an iteration"
        raise UserError(f"{count} are fewer than {replicas} data-parallel replicas: raise global_batch, or tp or pp")
    if max(lengths) > capacity:
        raise UserError(
            f"a document of {max(lengths):,} tokens is longer than a row of {capacity:,}: raise micro_batch or seq"
        )
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rows = _best_fit(order, lengths, capacity) if pack else [[i] for i in order]
    wanted = -(-len(rows) // replicas) * replicas
    if wanted > len(lengths):
        count = f"{len(lengths)} documents"
        raise UserError(
            f"{count} make no whole number of rows for each of {replicas} replicas: use a global_batch of {wanted}"
        )
    even = _evenly(order, lengths, capacity, wanted) if pack else None
    rows = even if even is not None else _split_until(rows, lengths, wanted)
    return _deal(rows, lengths, capacity, replicas)


def _best_fit(order: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best fit, longest first: put each document into the fullest row with enough room."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for document in order:
        at = bisect_left(room, (lengths[document], -1))
        if at < len(room):
            left, row = room.pop(at)
            rows[row].append(document)
        else:
            left, row = capacity, len(rows)
            rows.append([document])
        insort(room, (left - lengths[document], row))
    return rows


def _evenly(order: Sequence[int], lengths: Sequence[int], capacity: int, num_rows: int) -> list[list[int]] | None:
    """Longest first, each into the emptiest of `num_rows` rows. None if a row overflows or stays empty."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    loads = [(0, row) for row in range(num_rows)]
    for document in order:
        load, row = heapq.heappop(loads)
        if load + lengths[document] > capacity:
            return None
        rows[row].append(document)
        heapq.heappush(loads, (load + lengths[document], row))
    return rows


def _split_until(rows: list[list[int]], lengths: Sequence[int], num_rows: int) -> list[list[int]]:
    """Move the last document of the fullest row to a new row, until there are enough rows."""
    rows = [list(row) for row in rows]
    while len(rows) < num_rows:
        fullest = max((row for row in rows if len(row) > 1), key=lambda row: sum(lengths[i] for i in row))
        rows.append([fullest.pop()])
    return rows


def _deal(rows: list[list[int]], lengths: Sequence[int], capacity: int, replicas: int) -> BatchPlan:
    """Put rows of similar size into one micro-batch; the heaviest goes to the replica with the fewest tokens so far."""
    load = {id(row): sum(lengths[i] for i in row) for row in rows}
    ordered = sorted(rows, key=lambda row: (-load[id(row)], row))
    totals = [0] * replicas
    dealt: list[list[tuple[int, ...]]] = [[] for _ in range(replicas)]
    for start in range(0, len(ordered), replicas):
        emptiest_first = sorted(range(replicas), key=lambda replica: (totals[replica], replica))
        for replica, row in zip(emptiest_first, ordered[start : start + replicas], strict=True):
            dealt[replica].append(tuple(sorted(row)))
            totals[replica] += load[id(row)]
    plan = tuple(tuple(mine) for mine in dealt)
    return BatchPlan(rows=plan, capacity=capacity, num_tokens=sum(totals), balance=float(np.mean(totals) / max(totals)))
