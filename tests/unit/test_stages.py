"""Partition into stages: the best there is, by comparison with all of them."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.plan.stages import partition
from tokenize_data.errors import UserError

COSTS = st.lists(st.floats(0, 10, allow_nan=False).map(lambda cost: round(cost, 3)), min_size=1, max_size=9)


@settings(deadline=None, max_examples=300)
@given(COSTS, st.integers(1, 9))
def test_no_other_cut_has_a_faster_slowest_stage(costs, stages):
    if stages > len(costs):
        with pytest.raises(UserError, match=f"{stages} pipeline stages for {len(costs)} parts"):
            partition(costs, stages)
        return
    found = partition(costs, stages)
    assert [part for stage in found for part in stage] == list(range(len(costs)))
    assert all(len(stage) for stage in found)
    greatest = max(sum(costs[part] for part in stage) for stage in found)
    for inner in combinations(range(1, len(costs)), stages - 1):
        edges = [0, *inner, len(costs)]
        other = max(sum(costs[start:end]) for start, end in pairwise(edges))
        assert greatest <= other + 1e-6


def test_the_head_counts():
    layers = [0.2, *[1.0] * 12, 3.0]
    assert [len(stage) for stage in partition(layers, 3)] == [6, 5, 3]


def test_eighty_layers_on_eight_stages_take_no_time():
    stages = partition([0.1, *[1.0] * 80, 2.0], 8)
    assert max(len(stage) for stage in stages) <= 12
    assert len(stages) == 8
