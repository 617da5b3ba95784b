"""Which groups of processes talk to each other, and how many of them a process is in: each distinct one takes memory of
its GPU.
"""

from __future__ import annotations

from sft.plan.layout import Layout


def communicators(layout: Layout) -> int:
    """Distinct sets of ranks of the first process, which is in as many as any."""
    return len(rank_sets(layout))


def rank_sets(layout: Layout) -> set[frozenset[int]]:
    """Of process 0: all, its replica, the holders of the same weights, its pipeline, its tensor group, the ends of its
    pipeline.
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
