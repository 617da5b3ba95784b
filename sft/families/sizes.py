"""Read the sizes in a config.json, under whichever names a family uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenize_data.errors import UserError, shorten

_NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "vocabulary": ("vocab_size",),
}
# Far above any real model. A larger value means a damaged file, or one made to exhaust memory.
_LARGEST = {
    **dict.fromkeys(_NAMES["layers"], 1_000),
    **dict.fromkeys(_NAMES["hidden"], 1 << 20),
    **dict.fromkeys(_NAMES["heads"], 1 << 16),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "head_dim"), 1 << 16),
    **dict.fromkeys(("vocab_size", "intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"), 1 << 26),
}


def sizes_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes that every model has, under the field names of `Architecture`."""
    kind = kind_of(config)
    return {name: _size(config, kind, name) for name in _NAMES}


def kind_of(config: Mapping[str, Any]) -> str:
    return str(config.get("model_type", "unknown"))


def check_sizes(config: Mapping[str, Any], file: object) -> None:
    """Reject absurd sizes before a plan or a model is built from them."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, Mapping)]
    for name, value in ((name, part[name]) for part in parts for name in part if name in _LARGEST):
        is_right = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST[name]
        if isinstance(value, (int, float, str)) and not is_right:
            raise UserError(
                f"{file}: {name} is {shorten(value)}, not a number from 1 to {_LARGEST[name]:,}: fetch the base "
                "model again"
            )


def _size(config: Mapping[str, Any], kind: str, what: str) -> int:
    value = next((config[name] for name in _NAMES[what] if isinstance(config.get(name), int)), None)
    if value is None or value < 1:
        raise UserError(
            f"config.json of this {kind} model has no {_NAMES[what][0]} above 0, which a plan needs: "
            "use a model whose config.json gives it"
        )
    return int(value)


def whole(config: Mapping[str, Any], name: str, default: int) -> int:
    value = config.get(name)
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else default
