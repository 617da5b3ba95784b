"""The learning rate of an iteration: a function of its number, and of nothing else, so that resuming changes
nothing.
"""

from __future__ import annotations

import math


def learning_rate(
    iteration: int, iterations: int, *, lr: float, min_lr: float, warmup_fraction: float, schedule: str
) -> float:
    """For `iteration`, counted from 1. Rises linearly, then falls to `min_lr` at the last iteration, or stays."""
    assert 1 <= iteration <= iterations, (iteration, iterations)
    warmup = math.ceil(warmup_fraction * iterations)
    if iteration <= warmup:
        return lr * iteration / warmup
    if schedule == "constant":
        return lr
    progress = (iteration - warmup) / max(iterations - warmup, 1)
    share = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return min_lr + (lr - min_lr) * share
