"""Assigns consecutive layers to pipeline stages so that the slowest stage is as fast as possible."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from sft.families.architecture import Architecture
from tokenize_data.errors import UserError


def layer_ranges(num_layers: int, stages: int, *, embedding_cost: float = 0.0, head_cost: float = 0.0) -> list[range]:
    """The layers of each stage, at least one. The embedding goes with the first layer, the head with the last; costs
    are in layers.
    """
    costs = [1.0] * num_layers
    costs[0] += embedding_cost
    costs[-1] += head_cost
    return partition(costs, stages)


def partition(costs: Sequence[float], stages: int) -> list[range]:
    """Cut `costs` (embedding, layers, head, in order) into `stages` runs of at least one, with the smallest possible
    greatest sum.

    Among the cuts with that greatest sum, the first stages take as much as they may: the last, which also computes the
    loss, stays light.
    """
    if not 1 <= stages <= len(costs):
        raise UserError(
            f"{stages} pipeline stages for {len(costs)} parts (embedding, layers, head): use --pp 1 to {len(costs)}"
        )
    if min(costs) < 0:
        raise UserError(f"a part has cost {min(costs)}: costs are at least 0")
    sums = [0.0, *accumulate(float(cost) for cost in costs)]
    limit = min(most for most in _candidates(sums) if _cuts(sums, stages, most) is not None)
    cuts = _cuts(sums, stages, limit)
    assert cuts is not None
    return [range(start, end) for start, end in zip([0, *cuts], [*cuts, len(costs)], strict=True)]


def _candidates(sums: Sequence[float]) -> list[float]:
    """The greatest sum is that of some run."""
    return [sums[end] - sums[start] for start in range(len(sums)) for end in range(start + 1, len(sums))]


def _cuts(sums: Sequence[float], stages: int, most: float) -> list[int] | None:
    """Ends of all stages but the last, none above `most`; each takes what it may, but leaves one part for each that
    follows.
    """
    total, start, cuts = len(sums) - 1, 0, []
    for stage in range(stages):
        end = min(bisect_right(sums, sums[start] + most + 1e-9 * max(most, 1.0)) - 1, total - (stages - 1 - stage))
        if end <= start:
            return None
        cuts.append(end)
        start = end
    return cuts[:-1] if start == total else None


def head_cost(model: Architecture, trained_share: float) -> float:
    """Of the head, in layers: only trained tokens are projected to the vocabulary."""
    return model.head_weights / model.layer_weights * trained_share
