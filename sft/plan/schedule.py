"""The learning rate as a function of the iteration only, so that resuming changes nothing."""

from __future__ import annotations

import math

_TIMESCALE = 10_000  # for inverse_sqrt without warm-up, as in transformers


def learning_rate(
    iteration: int,
    iterations: int,
    *,
    lr: float,
    min_lr: float,
    warmup_fraction: float,
    schedule: str,
    cycles: int = 1,
    power: float = 1.0,
    decay_fraction: float = 0.1,
) -> float:
    """The learning rate of `iteration`, counted from 1. It rises linearly, then falls to `min_lr` at the last
    iteration or stays constant. inverse_sqrt falls more slowly, and not below `min_lr`. wsd rises from `min_lr`, as
    in transformers.
    """
    assert 1 <= iteration <= iterations, (iteration, iterations)
    warmup = math.ceil(warmup_fraction * iterations)
    if iteration <= warmup:
        lowest = min_lr if schedule == "wsd" else 0.0
        return lowest + (lr - lowest) * iteration / warmup
    if schedule == "constant":
        return lr
    if schedule == "inverse_sqrt":
        timescale = warmup or _TIMESCALE
        return max(min_lr, lr / math.sqrt((iteration + timescale - warmup) / timescale))
    if schedule == "wsd":
        decay = min(math.ceil(decay_fraction * iterations), iterations - warmup)
        progress = max(0.0, (iteration - (iterations - decay)) / decay)
    else:
        progress = (iteration - warmup) / (iterations - warmup)
    return min_lr + (lr - min_lr) * _share(schedule, progress, cycles, power)


def _share(schedule: str, progress: float, cycles: int, power: float) -> float:
    """The remaining share of the way from lr to min_lr."""
    if schedule in ("linear", "polynomial"):
        return float((1 - progress) ** (power if schedule == "polynomial" else 1))
    if schedule == "cosine_with_restarts" and progress < 1:
        progress = cycles * progress % 1.0
    return (1 + math.cos(math.pi * progress)) / 2


def in_words(
    *,
    lr: float,
    min_lr: float,
    warmup: str,
    schedule: str,
    cycles: int = 1,
    power: float = 1.0,
    decay_fraction: float = 0.1,
) -> str:
    """Describe the schedule: rises to 2e-05 over 10% of the iterations, then cosine to 2e-06."""
    after = {
        "constant": "constant",
        "inverse_sqrt": f"inverse_sqrt, at least {min_lr:g}",
        "polynomial": f"polynomial of power {power:g} to {min_lr:g}",
        "cosine_with_restarts": f"cosine to {min_lr:g} in {cycles} cycle{'' if cycles == 1 else 's'}",
        "wsd": f"constant, and cosine to {min_lr:g} over the last {decay_fraction:.3g} of the iterations",
    }.get(schedule, f"{schedule} to {min_lr:g}")
    return f"rises to {lr:g} over {warmup}, then {after}"
