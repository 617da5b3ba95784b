"""Turn a config.json into an `Architecture`, for the two structures that most families share.

Each family's file changes what differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sft.families.architecture import Architecture, Linear
from sft.families.sizes import kind_of, sizes_of, whole


def rotary(
    config: Mapping[str, Any],
    *,
    head_size: int | None = None,
    has_biases: bool | None = None,
    is_tied: bool = False,
    window: int | None = None,
    whole_every: int | None = None,
    norms: int = 2,
    is_known: bool = True,
) -> Architecture:
    """Return the architecture of a Llama-like model: RMS norms, rotary positions, a gated MLP.

    The arguments are the family's defaults for keys that config.json omits. `has_biases` is about queries, keys and
    values; one layer in `whole_every` has no window.
    """
    sizes = sizes_of(config)
    hidden, heads = sizes["hidden"], sizes["heads"]
    groups = whole(config, "num_key_value_heads", heads)
    size = whole(config, "head_dim", head_size or hidden // heads)
    inner = whole(config, "intermediate_size", 4 * hidden)
    bias, mlp_bias = bool(config.get("attention_bias", False)), bool(config.get("mlp_bias", False))
    in_bias, out_bias = (bias, bias) if has_biases is None else (has_biases, False)
    queries, shared = heads * size, groups * size
    span, share = _window(config, window, whole_every or sizes["layers"] + 1, sizes["layers"])
    return Architecture(
        kind=kind_of(config),
        **sizes,
        key_value_heads=groups,
        head_size=size,
        intermediate=inner,
        is_gated=True,
        linears=(
            Linear(name="q_proj", inputs=hidden, outputs=queries, split="columns", has_bias=in_bias),
            Linear(name="k_proj", inputs=hidden, outputs=shared, split="heads", has_bias=in_bias),
            Linear(name="v_proj", inputs=hidden, outputs=shared, split="heads", has_bias=in_bias),
            Linear(name="o_proj", inputs=queries, outputs=hidden, split="rows", has_bias=out_bias),
            Linear(name="gate_proj", inputs=hidden, outputs=inner, split="columns", has_bias=mlp_bias),
            Linear(name="up_proj", inputs=hidden, outputs=inner, split="columns", has_bias=mlp_bias),
            Linear(name="down_proj", inputs=inner, outputs=hidden, split="rows", has_bias=mlp_bias),
        ),
        is_tied=bool(config.get("tie_word_embeddings", is_tied)),
        num_norms=norms,
        norm_weights=norms * hidden,
        window=span,
        window_share=share,
        is_known=is_known,
    )


def plain(
    config: Mapping[str, Any],
    linears: Sequence[Linear],
    *,
    inner: int,
    num_norms: int,
    groups: int | None = None,
    is_tied: bool = False,
    **more: Any,
) -> Architecture:
    """Return the architecture of a model with layer norms and a two-layer MLP. `groups` is the number of key-value
    heads.
    """
    sizes = sizes_of(config)
    hidden, heads = sizes["hidden"], sizes["heads"]
    return Architecture(
        kind=kind_of(config),
        **sizes,
        key_value_heads=groups or heads,
        head_size=hidden // heads,
        intermediate=inner,
        is_gated=False,
        linears=tuple(linears),
        is_tied=bool(config.get("tie_word_embeddings", is_tied)),
        num_norms=num_norms,
        norm_weights=num_norms * 2 * hidden,
        is_rms=False,
        **more,
    )


def _window(config: Mapping[str, Any], default: int | None, every: int, layers: int) -> tuple[int | None, float]:
    """Return the window and the share of layers that use it."""
    window = config.get("sliding_window", default)
    if not isinstance(window, int):
        return None, 0.0
    types = config.get("layer_types")
    if isinstance(types, list) and types:
        return window, types.count("sliding_attention") / len(types)
    return window, (layers - layers // every) / layers
