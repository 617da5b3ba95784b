"""Groups of processes: one communicator for each distinct set of ranks, DeepSpeed's included, as many as the plan
counts.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch.distributed as dist
from deepspeed import comm
from deepspeed.runtime.pipe.topology import PipelineParallelGrid

from sft.engine.groups import form_groups
from sft.plan.communicators import communicators
from sft.plan.layout import Layout

LAYOUTS = [
    Layout(),
    Layout(dp=4),
    Layout(tp=4),
    Layout(pp=2),
    Layout(pp=4),
    Layout(tp=2, dp=2),
    Layout(pp=2, dp=2),
    Layout(tp=2, pp=2),
    Layout(tp=2, pp=4),
    Layout(tp=2, pp=2, dp=2),
    Layout(tp=2, pp=4, dp=2),
    Layout(tp=8, pp=8),
]


class Group:
    """What torch gives for a set of ranks."""

    def __init__(self, ranks: list[int]) -> None:
        self.ranks = ranks


def formed(
    monkeypatch: pytest.MonkeyPatch, layout: Layout, rank: int
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """(the sets of ranks that were asked of torch, those of them that `rank` is in, WORLD included)."""
    asked: list[tuple[int, ...]] = []

    def new_group(ranks: list[int]) -> Group:
        asked.append(tuple(ranks))
        return Group(ranks)

    for module in (dist, comm):
        monkeypatch.setattr(
            module, "get_rank", lambda group=None: group.ranks.index(rank) if isinstance(group, Group) else rank
        )
        monkeypatch.setattr(
            module, "get_world_size", lambda group=None: len(group.ranks) if isinstance(group, Group) else layout.world
        )
    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=Group(list(range(layout.world)))))
    before = comm.new_group
    processes = form_groups(layout)
    with processes.communicators.lent():
        comm.new_group(ranks=range(layout.world))  # as its PipelineModule does
        grid = PipelineParallelGrid(topology=processes.topology)
        assert grid.get_data_parallel_world_size() == layout.dp
    assert comm.new_group is before
    return asked, processes.communicators.own


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_each_set_of_ranks_has_one_communicator(monkeypatch, layout):
    orders = set()
    for rank in {0, layout.world // 2, layout.world - 1}:
        asked, own = formed(monkeypatch, layout, rank)
        assert len(asked) == len(set(asked))
        assert tuple(range(layout.world)) not in asked  # there is one already
        assert all(rank in ranks for ranks in own)
        assert len(own) <= communicators(layout)
        if rank == 0:
            assert len(own) == communicators(layout)
        orders.add(tuple(asked))
    assert len(orders) == 1  # forming one is a collective call


def test_what_a_plan_counts():
    assert communicators(Layout()) == 1
    assert communicators(Layout(dp=8)) == 2  # all, and groups of one
    assert communicators(Layout(tp=8)) == 2
    assert communicators(Layout(tp=2, pp=4, dp=2)) == 6
