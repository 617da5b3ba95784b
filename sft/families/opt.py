"""OPT: learned positions, ReLU, and in OPT-350m an embedding that is narrower than the layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft.families.architecture import Architecture, Linear
from sft.families.counting import plain
from sft.families.family import SMALL, Family
from sft.families.sizes import sizes_of, whole
from sft.families.table import register

_PLAN = {
    "self_attn.q_proj": "colwise",
    "self_attn.k_proj": "colwise",
    "self_attn.v_proj": "colwise",
    "self_attn.out_proj": "rowwise",
    "fc1": "colwise",
    "fc2": "rowwise",
}
_SMALL = {
    **{name: value for name, value in SMALL.items() if name != "intermediate_size"},
    "ffn_dim": SMALL["intermediate_size"],
    "dropout": 0.0,
}


def _count(config: Mapping[str, Any]) -> Architecture:
    hidden = sizes_of(config)["hidden"]
    inner, bias = whole(config, "ffn_dim", 4 * hidden), bool(config.get("enable_bias", True))
    names = (("q_proj", "columns"), ("k_proj", "columns"), ("v_proj", "columns"), ("out_proj", "rows"))
    linears = (
        *(Linear(name=name, inputs=hidden, outputs=hidden, split=split, has_bias=bias) for name, split in names),
        Linear(name="fc1", inputs=hidden, outputs=inner, split="columns", has_bias=bias),
        Linear(name="fc2", inputs=inner, outputs=hidden, split="rows", has_bias=bias),
    )
    embedding = whole(config, "word_embed_proj_dim", hidden)
    has_final = bool(config.get("do_layer_norm_before", True)) and not config.get("_remove_final_layer_norm", False)
    return plain(
        config,
        linears,
        inner=inner,
        num_norms=2,
        is_tied=True,
        has_final_norm=has_final,
        position_weights=(whole(config, "max_position_embeddings", 2048) + 2) * hidden,
        embedding_size=embedding if embedding != hidden else None,
        kept_inner=1,  # ReLU keeps only its output, which the next layer keeps too
    )


def _small_sizes(config: Any, hidden: int) -> Mapping[str, int]:
    is_narrow = config.word_embed_proj_dim != config.hidden_size
    return {"word_embed_proj_dim": hidden // 2 if is_narrow else hidden}


register(
    Family(
        kind="opt",
        count=_count,
        tensor_plan=lambda config: _PLAN,
        has_position_limit=True,
        small_sizes=_small_sizes,
        variants={"opt": _SMALL, "opt-350m": {**_SMALL, "do_layer_norm_before": False, "word_embed_proj_dim": 32}},
    )
)
