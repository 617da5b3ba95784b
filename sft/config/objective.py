"""Settings: what the loss counts."""

from __future__ import annotations

from dataclasses import dataclass

from tokenize_data.settings import Group, setting


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings(Group):
    loss_mask: float = setting(
        0.0,
        "weight of user and system tokens in the loss",
        metavar="W",
        least=0,
        most=1,
        fixed=True,
        suffix=(3, "loss"),
    )
    label_smoothing: float = setting(
        0.0, "share of the target probability that is spread over all tokens", metavar="F", least=0, most=1, fixed=True
    )
