"""Gemma: an explicit head size and a tied head. Gemma 2 and 3 have four norms in a layer, and sliding windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sft.families.architecture import Architecture
from sft.families.counting import rotary
from sft.families.family import SMALL_GROUPED, Family
from sft.families.sizes import whole
from sft.families.table import architecture_of, register

_SMALL = {**SMALL_GROUPED, "head_dim": 16}
_SMALL_WINDOWS = {**_SMALL, "sliding_window": 8, "query_pre_attn_scalar": 20}


def _gemma(config: Mapping[str, Any], **more: Any) -> Architecture:
    return replace(rotary(config, head_size=256, is_tied=True, **more), widens_norms=True)


def _gemma2(config: Mapping[str, Any]) -> Architecture:
    has_softcap = config.get("attn_logit_softcapping", 50.0) is not None
    return replace(_gemma(config, norms=4, window=4096, whole_every=2), attention_softcap=has_softcap)


def _gemma3_text(config: Mapping[str, Any]) -> Architecture:
    model = _gemma(config, norms=4, window=4096, whole_every=whole(config, "sliding_window_pattern", 6))
    return replace(model, norms_heads=True, norm_weights=model.norm_weights + 2 * model.head_size)


def _gemma3(config: Mapping[str, Any]) -> Architecture:
    """Count the text part of the multimodal model."""
    if isinstance(config.get("text_config"), dict):
        return architecture_of({"model_type": "gemma3_text", **config["text_config"]})
    return rotary(config, is_known=False)


register(
    Family(kind="gemma", count=_gemma, variants={"gemma": _SMALL}),
    Family(kind="gemma2", count=_gemma2, variants={"gemma2": _SMALL_WINDOWS}),
    Family(
        kind="gemma3_text", count=_gemma3_text, variants={"gemma3": {**_SMALL_WINDOWS, "sliding_window_pattern": 2}}
    ),
    Family(kind="gemma3", count=_gemma3),
)
