"""Mistral: sliding-window attention in all layers."""

from functools import partial

from sft.families.counting import rotary
from sft.families.family import SMALL_GROUPED, Family
from sft.families.table import register

register(
    Family(
        kind="mistral",
        count=partial(rotary, window=4096),
        variants={
            "mistral": {**SMALL_GROUPED, "sliding_window": None},
            "mistral-window": {**SMALL_GROUPED, "sliding_window": 8},
        },
    )
)
