"""Which node a process is on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.plan.layout import Layout
from sft.plan.placement import Placement


@pytest.mark.parametrize(
    ("layout", "per_node", "text"),
    [
        ((8, 8, 1), 8, "8 nodes of 8, tensor groups inside a node, pipeline transfers to the next node"),
        ((2, 4, 2), 8, "2 nodes of 8, tensor groups inside a node, all pipeline transfers inside a node, 2 replicas"),
        ((2, 4, 1), 4, "2 nodes of 4, tensor groups inside a node, 2 of 3 pipeline transfers inside a node"),
        ((1, 1, 4), 2, "2 nodes of 2, 4 replicas"),
        ((16, 1, 1), 8, "2 nodes of 8, tensor groups over up to 2 nodes"),
    ],
)
def test_what_the_header_says(layout: tuple[int, int, int], per_node: int, text: str):
    tp, pp, dp = layout
    assert Placement(layout=Layout(tp=tp, pp=pp, dp=dp), per_node=per_node).text() == text


def test_tensor_groups_over_nodes_are_a_warning_with_the_cost():
    placement = Placement(layout=Layout(tp=16, pp=4), per_node=8)
    said = placement.warning(layers=80, hidden=8192, row_tokens=8192, bytes_per_value=2)
    # 80 / 4 layers, 4 sums each, of 8192 x 8192 x 2 bytes, 2 x 15 / 16 of it sent
    assert said is not None
    assert (
        "--tp 16 does not fit into nodes of 8 processes: for each row of 8,192 tokens every process sends 20 "
        "GB between nodes"
    ) in said
    assert said.endswith("use --tp 8 and --pp 8")
    assert (
        Placement(layout=Layout(tp=8, pp=8), per_node=8).warning(
            layers=80, hidden=8192, row_tokens=8192, bytes_per_value=2
        )
        is None
    )


@given(st.integers(0, 3), st.integers(1, 6), st.integers(1, 4), st.integers(0, 3))
def test_groups_that_divide_a_node_stay_inside(tp_power: int, pp: int, dp: int, further: int):
    tp = 2**tp_power
    placement = Placement(layout=Layout(tp=tp, pp=pp, dp=dp), per_node=tp * 2**further)
    assert placement.nodes_of_a_tensor_group == 1
    inside, pairs = placement.transfers
    assert pairs == dp * (pp - 1)
    assert 0 <= inside <= pairs
