"""Assigns consecutive layers to pipeline stages so that the slowest stage is as fast as possible."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from sft.families.architecture import Architecture
from tokenize_data.errors import UserError


def layer_ranges(num_layers: int, stages: int, *, embedding_cost: float = 0.0, head_cost: float = 0.0) -> list[range]:
    """The layers of each stage, at least one. The embedding belongs to the first layer, the head to the last; costs
    are in layers.
    """
    costs = [1.0] * num_layers
    costs[0] += embedding_cost
    costs[-1] += head_cost
    return partition(costs, stages)


def partition(costs: Sequence[float], stages: int) -> list[range]:
    """Split `costs` (embedding, layers, head, in order) into `stages` runs of at least one, minimising the largest
    sum. Among equal splits, the first stages take as much as possible, since the last one also computes the loss.
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
    """Candidates for the largest sum: the sums of all runs."""
    return [sums[end] - sums[start] for start in range(len(sums)) for end in range(start + 1, len(sums))]


def _cuts(sums: Sequence[float], stages: int, most: float) -> list[int] | None:
    """The ends of all stages but the last, with no sum above `most`. Each stage takes as much as it may, but leaves
    one part per later stage.
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
    """The head's cost in layers: only trained tokens are projected to the vocabulary."""
    return model.head_weights / model.layer_weights * trained_share
