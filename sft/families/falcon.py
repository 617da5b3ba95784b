"""Falcon 7B (one key-value head for all queries) and 40B. Its layers take a mask of the whole row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft.families.architecture import Architecture, Linear
from sft.families.counting import plain
from sft.families.family import SMALL, Family
from sft.families.sizes import sizes_of, whole
from sft.families.table import register

_PLAN = {
    "self_attention.query_key_value": "colwise",
    "self_attention.dense": "rowwise",
    "mlp.dense_h_to_4h": "colwise",
    "mlp.dense_4h_to_h": "rowwise",
}
# With one key-value head for all queries, every rank needs its rows: projections are split, attention is repeated on
# all ranks.
_MULTI_QUERY_PLAN = {
    **_PLAN,
    "self_attention.query_key_value": "colwise_gather_output",
    "self_attention.dense": "rowwise_split_input",
}
_SMALL = {**SMALL, "bias": False, "alibi": False, "hidden_dropout": 0.0}


def _count(config: Mapping[str, Any]) -> Architecture:
    hidden, heads = (sizes_of(config)[name] for name in ("hidden", "heads"))
    size, is_new = hidden // heads, bool(config.get("new_decoder_architecture", False))
    is_single = bool(config.get("multi_query", True)) and not is_new
    groups = 1 if is_single else whole(config, "num_kv_heads", heads) if is_new else heads
    bias, inner = bool(config.get("bias", False)), whole(config, "ffn_hidden_size", 4 * hidden)
    fused = (heads + 2 * groups) * size
    linears = (
        Linear(name="query_key_value", inputs=hidden, outputs=fused, split="columns", has_bias=bias),
        Linear(name="dense", inputs=hidden, outputs=hidden, split="rows", has_bias=bias),
        Linear(name="dense_h_to_4h", inputs=hidden, outputs=inner, split="columns", has_bias=bias),
        Linear(name="dense_4h_to_h", inputs=inner, outputs=hidden, split="rows", has_bias=bias),
    )
    given = config.get("num_ln_in_parallel_attn")
    given = 2 if given is None else int(given)
    norms = given if is_new else (1 if config.get("parallel_attn", True) else 2)
    return plain(config, linears, inner=inner, num_norms=norms, groups=groups, is_tied=True, keeps_row_scores=True)


def _tensor_plan(config: Any) -> Mapping[str, str]:
    return _MULTI_QUERY_PLAN if config.multi_query and not config.new_decoder_architecture else _PLAN


def _key_value_heads(config: Any) -> int:
    return int(config.num_kv_heads if config.new_decoder_architecture else config.num_attention_heads)


register(
    Family(
        kind="falcon",
        count=_count,
        tensor_plan=_tensor_plan,
        key_value_heads=_key_value_heads,
        shares_key_value_heads=False,
        takes_row_mask=True,
        layer_options={"alibi": None},
        variants={
            "falcon": {**_SMALL, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
            "falcon-new": {**_SMALL, "new_decoder_architecture": True, "num_kv_heads": 2},
        },
    )
)
