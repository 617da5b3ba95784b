"""Detect mixture-of-experts models from config.json. They are not supported yet, neither in plans nor in training."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tokenize_data.errors import UserError

_COUNT = re.compile(
    r"(moe_)?(num|n)_(local_|routed_)?experts"
)  # num_experts, num_local_experts, n_routed_experts, moe_num_experts
_SWITCHES = ("is_moe", "enable_moe_block")  # false in the dense models of families that have both
_OTHER_MODALITIES = ("vision", "audio", "image", "video", "speech")


def check_no_experts(config: Mapping[str, Any]) -> None:
    """Raise UserError for a mixture-of-experts model. In a multimodal model, only the text part is checked."""
    if has_experts(config):
        kind = config.get("model_type", "this")
        raise UserError(f"{kind} is a mixture-of-experts model; experts are not supported yet: use a dense model")


def has_experts(config: Mapping[str, Any]) -> bool:
    """Return whether any layer routes tokens to experts. A single expert counts only if `model_type` contains "moe"."""
    if any(config.get(switch) is False for switch in _SWITCHES):
        return False
    counts = [count for key, value in config.items() if _COUNT.fullmatch(str(key)) for count in _numbers(value)]
    least = 1 if "moe" in str(config.get("model_type", "")) else 2
    if any(count >= least for count in counts):
        return True
    return any(has_experts(part) for part in _parts(config))


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the nested configurations: text_config, ffn_config, thinker_config and so on."""
    for key, value in config.items():
        if isinstance(value, Mapping) and str(key).endswith("_config") and not str(key).startswith(_OTHER_MODALITIES):
            yield value


def _numbers(value: Any) -> list[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return [number for number in values if isinstance(number, int) and not isinstance(number, bool)]
