"""Phi-3: one fused layer for queries, keys and values, and one for gate and up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sft.families.architecture import Architecture, Linear
from sft.families.counting import rotary
from sft.families.family import SMALL_GROUPED, Family
from sft.families.table import register

_PLAN = {
    "self_attn.qkv_proj": "colwise_query_key_value",
    "self_attn.o_proj": "rowwise",
    "mlp.gate_up_proj": "colwise_halves",
    "mlp.down_proj": "rowwise",
}


def _count(config: Mapping[str, Any]) -> Architecture:
    model = rotary(config)
    hidden, inner, shared = model.hidden, model.intermediate, model.key_value_heads * model.head_size
    linears = (
        Linear(name="qkv_proj", inputs=hidden, outputs=model.queries + 2 * shared, split="columns"),
        Linear(name="o_proj", inputs=model.queries, outputs=hidden, split="rows"),
        Linear(name="gate_up_proj", inputs=hidden, outputs=2 * inner, split="columns"),
        Linear(name="down_proj", inputs=inner, outputs=hidden, split="rows"),
    )
    return replace(model, linears=linears, keeps_fused=True)


register(
    Family(
        kind="phi3",
        count=_count,
        tensor_plan=lambda config: _PLAN,
        shares_key_value_heads=False,
        variants={"phi3": {**SMALL_GROUPED, "resid_pdrop": 0.0, "embd_pdrop": 0.0}},
    )
)
