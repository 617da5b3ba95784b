"""Documents to micro-batches: exact on documents made by hand, and in sum the same however they are packed and
spread.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sft.engine.feed import Feed, make_row
from sft.objective.cross_entropy import CrossEntropy
from tests.distributed.data import MemoryReader
from tokenize_data.reader import Document
from tokenize_data.rendered import ASSISTANT, SYSTEM, TEMPLATE, USER

WEIGHTS = np.zeros(4, np.float32)
WEIGHTS[[SYSTEM, USER, ASSISTANT]] = [0.25, 0.25, 1.0]
FIRST = Document(
    np.arange(10, 17, dtype=np.uint16),
    np.array([1, 2, 1, 2, 1]),
    np.array([TEMPLATE, USER, TEMPLATE, ASSISTANT, TEMPLATE]),
)
SECOND = Document(np.arange(20, 23, dtype=np.uint16), np.array([1, 2]), np.array([ASSISTANT, ASSISTANT]))


def test_a_row_of_two_documents():
    (ids, positions), (kept, targets, weights, documents) = make_row([FIRST, SECOND], WEIGHTS, numbers=[7, 3])
    assert documents.tolist() == [7 if place < len(FIRST.ids) - 1 else 3 for place in kept.tolist()]
    assert ids.tolist() == [[10, 11, 12, 13, 14, 15, 20, 21]]
    assert positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]]
    assert kept.tolist() == [0, 1, 3, 4, 6, 7]
    assert targets.tolist() == [11, 12, 14, 15, 21, 22]
    assert weights.tolist() == [0.25, 0.25, 1.0, 1.0, 1.0, 1.0]
    assert {tensor.dtype for tensor in (ids, positions, kept, targets)} == {torch.int64}


def test_tokens_that_weigh_nothing_are_left_out():
    _, (kept, targets, weights, _) = make_row([FIRST], np.where(np.arange(4) == ASSISTANT, 1.0, 0.0).astype(np.float32))
    assert (kept.tolist(), targets.tolist(), weights.tolist()) == ([3, 4], [14, 15], [1.0, 1.0])


def test_padding_to_a_multiple_is_a_document_that_counts_nothing():
    (ids, positions), labels = make_row([FIRST, SECOND], WEIGHTS, multiple=5)
    assert ids.tolist() == [[10, 11, 12, 13, 14, 15, 20, 21, 0, 0]]
    assert positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 0, 1]]
    for found, expected in zip(labels, make_row([FIRST, SECOND], WEIGHTS)[1], strict=True):
        assert torch.equal(found, expected)
    assert make_row([FIRST, SECOND], WEIGHTS, multiple=4)[0][0].size(1) == 8


@pytest.mark.parametrize("loss_mask", [0.0, 0.5])
@pytest.mark.parametrize(("replicas", "pack"), [(1, True), (2, True), (4, True), (1, False), (3, False)])
def test_the_engines_mean_is_the_mean_over_trained_tokens(replicas, pack, loss_mask):
    reader, numbers = MemoryReader(30, 131, 32), np.arange(5, 17)
    expected = _expected(reader, numbers, loss_mask)
    total = 0.0
    for replica in range(replicas):
        feed = _feed(reader, replicas, replica, pack=pack, loss_mask=loss_mask)
        batch = feed.plan(numbers)
        rows = list(feed.micro_batches(batch))
        assert len(rows) == batch.plan.num_micro_batches
        assert batch.total_weight == pytest.approx(sum(expected.values()))
        assert batch.num_trained == sum(int(reader.trained[number]) for number in numbers)
        assert batch.num_tokens == sum(len(reader[number].ids) - 1 for number in numbers)
        total += sum(
            float((_fake_losses(targets) * weights).sum() * scale) for _, (_, targets, weights, _, scale) in rows
        ) / len(rows)
    wanted = sum(float(_fake_losses(torch.tensor(target))) * weight for target, weight in expected.items()) / sum(
        expected.values()
    )
    assert total / replicas == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("documents", range(1, 10))
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_validation_counts_each_document_once_whatever_the_number_of_replicas(documents, replicas, pack):
    """Also where replicas do not divide the documents, which are too long to share a row."""
    reader = MemoryReader(10, 131, 32)
    numbers = np.arange(documents)
    found, lengths = 0.0, set()
    for replica in range(replicas):
        _, rows = _feed(reader, replicas, replica, pack=pack, capacity=32).plan_for_validation(numbers, replicas)
        rows = list(rows)
        lengths.add(len(rows))
        found += sum(float((_fake_losses(targets) * weights).sum()) for _, (_, targets, weights, _, _) in rows)
    expected = _expected(reader, numbers, 0.0)
    assert len(lengths) == 1
    assert found == pytest.approx(
        sum(float(_fake_losses(torch.tensor(target))) * weight for target, weight in expected.items()), rel=1e-5
    )


def _feed(reader, replicas, replica, *, pack, loss_mask=0.0, capacity=64):
    return Feed(
        reader,
        capacity=capacity,
        replicas=replicas,
        replica=replica,
        objective=CrossEntropy(loss_mask=loss_mask),
        pack=pack,
    )


def _fake_losses(targets: torch.Tensor) -> torch.Tensor:
    return (targets.double() * 0.37).sin() + 2.0


def _expected(reader: MemoryReader, numbers: np.ndarray, loss_mask: float) -> dict[int, float]:
    """{token id: what it weighs in all}"""
    weights = {TEMPLATE: 0.0, SYSTEM: loss_mask, USER: loss_mask, ASSISTANT: 1.0}
    found: dict[int, float] = {}
    for number in numbers:
        document = reader[int(number)]
        for target, role in zip(document.ids[1:].tolist(), document.roles()[1:].tolist(), strict=True):
            found[target] = found.get(target, 0.0) + weights[role]
    return {target: weight for target, weight in found.items() if weight}
