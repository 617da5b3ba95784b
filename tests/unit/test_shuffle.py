"""The shuffle of large data sets: it looks random, is the same from any position, and is recorded in the shards."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from sft.plan.sampler import Sampler
from sft.plan.shuffle import shuffled
from tests.conftest import pair
from tests.counting import lines_run
from tokenize_data import manifest
from tokenize_data.manifest import FEISTEL, PERMUTATION, shuffle_of
from tokenize_data.reader import ShardReader

LARGE = 100_000_000


@pytest.mark.parametrize("size", [1, 7, 65_536, 65_537, 100_003, 2**17, 2**17 + 1, 1_000_000])
def test_every_document_has_one_position(size):
    order = shuffled(size, (5, 0), np.arange(size))
    assert (np.sort(order) == np.arange(size)).all()


@pytest.mark.parametrize("size", [65_537, 131_072, 400_000])
def test_neighbours_and_positions_say_nothing_of_a_document(size):
    """Within what chance allows: correlations of 4 standard deviations, counts of 5."""
    order = shuffled(size, (5, 1), np.arange(size)).astype(np.float64)
    for one, other in ((order[:-1], order[1:]), (order[:-2], order[2:]), (order, np.arange(size))):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / np.sqrt(size)
    cells, _, _ = np.histogram2d(np.arange(size), order, bins=16)
    expected = size / 256
    assert np.abs(cells - expected).max() < 5 * np.sqrt(expected)
    assert abs((np.diff(order) > 0).mean() - 0.5) < 4 * np.sqrt(1 / 12 / size)  # rises as often as it falls


def test_the_first_documents_of_many_epochs_are_spread_evenly():
    found = np.concatenate([shuffled(LARGE, (5, epoch), np.arange(64)) for epoch in range(500)])
    counts, _ = np.histogram(found, bins=100, range=(0, LARGE))
    expected = len(found) / 100
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    assert len(np.unique(found)) > 0.999 * len(found)


def test_epochs_and_seeds_differ():
    orders = {tuple(shuffled(LARGE, key, np.arange(10))) for key in ((1, 0), (1, 1), (2, 0))}
    assert len(orders) == 3


def test_seeking_is_going_through():
    sampler, size = Sampler(100_000, 64, 3, shuffle=FEISTEL), 100_000
    whole = np.concatenate([sampler.documents(number) for number in range(2 * size // 64 + 2)])
    for epoch in (0, 1):
        assert (np.sort(whole[epoch * size : (epoch + 1) * size]) == np.arange(size)).all()
    for number in (0, 1562, 1563, 3000):  # the second and third where epochs meet
        fresh = Sampler(size, 64, 3, shuffle=FEISTEL).documents(number)
        assert fresh.tolist() == whole[number * 64 : (number + 1) * 64].tolist()


def test_an_iteration_of_a_hundred_million_costs_what_its_documents_cost():
    sampler = Sampler(LARGE, 64, 3, shuffle=FEISTEL)
    tracemalloc.start()
    try:
        for number in (0, 1, 1_000_000, 1_562_499, 1_562_500):
            assert lines_run(lambda number=number: sampler.documents(number)) < 5000
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_only_data_sets_that_are_too_large_are_shuffled_so():
    assert [shuffle_of(documents) for documents in (1, 2**24, 2**24 + 1)] == [PERMUTATION, PERMUTATION, FEISTEL]


def test_shards_say_how_they_are_shuffled(bench, monkeypatch):
    one, two = (bench.jsonl([pair(f"{name} {n}?", "Yes.") for n in range(9)], f"{name}.jsonl") for name in ("a", "b"))
    assert bench.tokenize("--data", one).code == 0
    assert bench.manifest()["shuffle"] == PERMUTATION
    monkeypatch.setattr(manifest, "_MOST_PERMUTED", 10)
    assert bench.tokenize("--data", two, "--append").code == 0
    assert bench.manifest()["shuffle"] == FEISTEL
    assert bench.tokenize("--data", one, two, run_name="whole").code == 0
    assert bench.manifest("whole")["shuffle"] == FEISTEL
    found = ShardReader(bench.tokenized / "whole").manifest
    assert found.fingerprint() != replace(found, shuffle=PERMUTATION).fingerprint()


def test_shards_of_earlier_releases_keep_their_order(bench):
    assert bench.tokenize("--data", bench.jsonl([pair("A?", "B.")] * 3)).code == 0
    file = bench.tokenized / "r" / "manifest.json"
    before = ShardReader(bench.tokenized / "r").manifest
    content = json.loads(file.read_text())
    del content["shuffle"]
    file.write_text(json.dumps(content))
    assert ShardReader(bench.tokenized / "r").manifest == before
    file.write_text(json.dumps({**content, "shuffle": "bubble"}))
    assert "shuffle is 'bubble'" in bench.tokenize("--data", bench.jsonl([pair("A?", "B.")] * 3)).err
