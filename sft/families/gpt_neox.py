"""GPT-NeoX, which Pythia uses too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft.families.architecture import Architecture, Linear
from sft.families.counting import plain
from sft.families.family import SMALL, Family
from sft.families.sizes import sizes_of, whole
from sft.families.table import register


def _count(config: Mapping[str, Any]) -> Architecture:
    hidden = sizes_of(config)["hidden"]
    inner, bias = whole(config, "intermediate_size", 4 * hidden), bool(config.get("attention_bias", True))
    linears = (
        Linear(name="query_key_value", inputs=hidden, outputs=3 * hidden, split="columns", has_bias=bias),
        Linear(name="dense", inputs=hidden, outputs=hidden, split="rows", has_bias=bias),
        Linear(name="dense_h_to_4h", inputs=hidden, outputs=inner, split="columns", has_bias=True),
        Linear(name="dense_4h_to_h", inputs=inner, outputs=hidden, split="rows", has_bias=True),
    )
    return plain(config, linears, inner=inner, num_norms=2)


register(
    Family(kind="gpt_neox", count=_count, variants={"gpt-neox": {**SMALL, "hidden_dropout": 0.0, "rotary_pct": 0.5}})
)
