"""Choose the objective from the settings. Each objective has one line here."""

from __future__ import annotations

from collections.abc import Callable

from sft.config.objective import ObjectiveSettings
from sft.objective.cross_entropy import CrossEntropy
from sft.objective.interface import Objective
from sft.objective.label_smoothing import SmoothedCrossEntropy

# The first entry that returns an objective wins.
_CHOICES: tuple[Callable[[ObjectiveSettings], Objective | None], ...] = (
    lambda asked: (
        SmoothedCrossEntropy(loss_mask=asked.loss_mask, smoothing=asked.label_smoothing)
        if asked.label_smoothing
        else None
    ),
    lambda asked: CrossEntropy(loss_mask=asked.loss_mask),
)


def objective_of(settings: ObjectiveSettings) -> Objective:
    """Return the objective that these settings select."""
    return next(found for choice in _CHOICES if (found := choice(settings)) is not None)
