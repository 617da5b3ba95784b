"""Qwen: query, key and value biases (Qwen2) or query and key norms (Qwen3); the window is off by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sft.families.architecture import Architecture
from sft.families.counting import rotary
from sft.families.family import SMALL_GROUPED, Family
from sft.families.table import register


def _qwen(config: Mapping[str, Any], **more: Any) -> Architecture:
    model = rotary(config, **more)
    return model if config.get("use_sliding_window", False) else replace(model, window=None, window_share=0.0)


def _qwen2(config: Mapping[str, Any]) -> Architecture:
    return _qwen(config, has_biases=True)


def _qwen3(config: Mapping[str, Any]) -> Architecture:
    model = _qwen(config, head_size=128)
    return replace(model, norms_heads=True, norm_weights=model.norm_weights + 2 * model.head_size)


register(
    Family(kind="qwen2", count=_qwen2, variants={"qwen2": SMALL_GROUPED}),
    Family(kind="qwen3", count=_qwen3, variants={"qwen3": {**SMALL_GROUPED, "head_dim": 16}}),
)
