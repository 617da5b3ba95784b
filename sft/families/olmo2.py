"""OLMo 2: queries and keys are normed over all heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sft.families.architecture import Architecture
from sft.families.counting import rotary
from sft.families.family import SMALL_GROUPED, Family
from sft.families.table import register

_PLAN = {
    "self_attn.q_proj": "colwise",
    "self_attn.k_proj": "colwise",
    "self_attn.v_proj": "colwise",
    "self_attn.o_proj": "rowwise",
    "self_attn.q_norm": "norm_over_heads",
    "self_attn.k_norm": "norm_over_heads",
    "mlp.gate_proj": "colwise",
    "mlp.up_proj": "colwise",
    "mlp.down_proj": "rowwise",
}


def _count(config: Mapping[str, Any]) -> Architecture:
    model = rotary(config)
    normed = model.queries + model.key_value_heads * model.head_size
    return replace(model, split_norm_weights=normed, norms_heads=True, widens_norms=True)


register(
    Family(
        kind="olmo2",
        count=_count,
        tensor_plan=lambda config: _PLAN,
        shares_key_value_heads=False,
        variants={"olmo2": SMALL_GROUPED},
    )
)
