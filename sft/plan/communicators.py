"""The communicators of a process: each distinct set of ranks takes GPU memory."""

from __future__ import annotations

from sft.plan.layout import Layout


def communicators(layout: Layout) -> int:
    """The number of distinct sets of ranks with process 0, which is in the most."""
    return len(rank_sets(layout))


def rank_sets(layout: Layout) -> set[frozenset[int]]:
    """The rank sets of process 0: all, its replica, replicas of its weights, its pipeline, its tensor group, the ends
    of its pipeline.
    """
    tp, pp, dp = layout.tp, layout.pp, layout.dp
    pipeline = range(0, tp * pp, tp)
    sets = [
        range(layout.world),
        range(tp * pp),
        range(0, layout.world, tp * pp),
        pipeline,
        range(tp),
        (0, pipeline[-1]),
    ]
    assert dp == len(sets[2])
    return {frozenset(ranks) for ranks in sets}
