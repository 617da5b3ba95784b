"""Iterations, the documents of each, and packing: properties that hold for every input."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.plan.packing import plan_batch
from sft.plan.sampler import Sampler, num_iterations
from tests.counting import lines_run
from tokenize_data.errors import UserError


@pytest.mark.parametrize(
    ("documents", "epochs", "batch", "expected"),
    [
        (200_000, 3, 64, 9375),
        (1, 1, 64, 1),
        (64, 1, 64, 1),
        (65, 1, 64, 2),
        (1000, 0.1, 10, 10),
        (3, 0.1, 1, 1),
        (10, 2.5, 5, 5),
    ],
)
def test_iterations(documents, epochs, batch, expected):
    assert num_iterations(documents, epochs, batch) == expected


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 100), st.integers(0, 5), st.integers(1, 4))
def test_each_epoch_is_a_new_permutation_and_nothing_is_left_out(documents, batch, seed, epochs):
    sampler = Sampler(documents, batch, seed)
    count = num_iterations(documents, epochs, batch)
    batches = [sampler.documents(iteration) for iteration in range(count)]
    assert all(len(made) == batch for made in batches)
    stream = np.concatenate(batches)
    for epoch in range(epochs):
        assert sorted(stream[epoch * documents : (epoch + 1) * documents]) == list(range(documents))
    seek = Sampler(documents, batch, seed)
    assert seek.documents(count - 1).tolist() == batches[-1].tolist()


def test_epochs_differ_and_seeds_differ():
    one, other = Sampler(1000, 1000, 1), Sampler(1000, 1000, 2)
    assert one.documents(0).tolist() != one.documents(1).tolist()
    assert one.documents(0).tolist() != other.documents(0).tolist()


LENGTHS = st.lists(st.integers(1, 400), min_size=1, max_size=80)


@settings(deadline=None, max_examples=300)
@given(LENGTHS, st.integers(1, 8), st.integers(400, 2000), st.booleans())
def test_packing_keeps_every_document_once_in_rows_that_hold_it(lengths, replicas, capacity, pack):
    try:
        plan = plan_batch(lengths, capacity, replicas, pack)
    except UserError:
        bound = math.ceil(len(lengths) / replicas) * replicas
        assert len(lengths) < replicas or bound > len(lengths)
        return
    assert len(plan.rows) == replicas
    assert {len(rows) for rows in plan.rows} == {plan.num_micro_batches}
    placed = sorted(document for rows in plan.rows for row in rows for document in row)
    assert placed == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= capacity for rows in plan.rows for row in rows)
    assert plan.num_tokens == sum(lengths)
    assert 0 < plan.fill <= 1
    assert 0 < plan.balance <= 1
    assert plan == plan_batch(lengths, capacity, replicas, pack)


@settings(deadline=None)
@given(LENGTHS, st.integers(400, 2000))
def test_packing_is_at_most_a_fifth_above_the_fewest_rows_possible(lengths, capacity):
    """Best fit decreasing: at most 11/9 of the optimum and one row."""
    plan = plan_batch(lengths, capacity)
    assert plan.num_micro_batches <= 11 / 9 * math.ceil(sum(lengths) / capacity) + 1 + sum(
        1 for n in lengths if n > capacity / 2
    )


def test_packing_is_tight_and_balanced_on_real_lengths():
    rng = np.random.default_rng(0)
    fills, balances = [], []
    for _ in range(50):
        lengths = np.clip(rng.lognormal(5.8, 0.4, 64).astype(int), 20, 2048)
        plan = plan_batch(lengths, 4096, 4)
        fills.append(plan_batch(lengths, 2048).fill)
        balances.append(plan.balance)
    assert np.mean(fills) > 0.9
    assert np.mean(balances) > 0.97


def test_an_iteration_is_planned_in_few_steps():
    """In lines of Python: packing looks at the rows that there are for each document, and no oftener."""
    rng = np.random.default_rng(0)
    some, many = (lines_run(lambda n=n: plan_batch(rng.integers(20, 2048, n).tolist(), 4096, 4)) for n in (64, 256))
    assert some < 64 * 100
    assert many < 16 * some


@pytest.mark.parametrize(
    ("lengths", "capacity", "replicas", "message"),
    [
        ([10] * 3, 100, 4, "3 documents an iteration are fewer than 4 data-parallel replicas"),
        ([10, 200], 100, 1, "200 tokens is longer than a row of 100"),
        ([100] * 9, 100, 4, "use a global_batch of 12"),
    ],
)
def test_what_cannot_be_packed(lengths, capacity, replicas, message):
    with pytest.raises(UserError, match=message):
        plan_batch(lengths, capacity, replicas)
