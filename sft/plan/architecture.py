"""What a model is made of, from its config.json alone: its linear layers, norms and embeddings, and how many weights
each has.

Nothing is built, so that a plan needs neither torch nor the weights. The families that training knows are described one
by one; another family is counted like Llama, which is said, and its weights' files, where they are there, say how many
there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sft.plan.experts import check_no_experts
from tokenize_data.errors import UserError, shorten

_ROTARY_KINDS = ("llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi3", "olmo2", "granite")
KNOWN_KINDS = (*_ROTARY_KINDS, "gpt_neox", "opt", "falcon")
# config.json leaves out what a family has by default.
_TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3_text", "opt", "falcon")
_BIAS_BY_DEFAULT = {"gpt_neox": True, "opt": True, "qwen2": True}
_HEAD_SIZE_BY_DEFAULT = {"gemma": 256, "gemma2": 256, "gemma3_text": 256, "qwen3": 128}
_NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "vocabulary": ("vocab_size",),
}
# Far above any model. What is larger is a damaged file, or one that is meant to exhaust whoever builds the model.
_LARGEST = {
    **dict.fromkeys(_NAMES["layers"], 1_000),
    **dict.fromkeys(_NAMES["hidden"], 1 << 20),
    **dict.fromkeys(_NAMES["heads"], 1 << 16),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "head_dim"), 1 << 16),
    **dict.fromkeys(("vocab_size", "intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"), 1 << 26),
}


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer. `split`: which of its features tensor ranks share out: columns (outputs), heads (key and value),
    rows (inputs).
    """

    name: str
    inputs: int
    outputs: int
    split: str
    has_bias: bool = False

    @property
    def num_weights(self) -> int:
        return self.inputs * self.outputs + (self.outputs if self.has_bias else 0)

    def shape_on(self, tp: int, head_size: int) -> tuple[int, int]:
        """(inputs, outputs) on one tensor rank. A key-value head is never cut: ranks share one where there are too
        few.
        """
        if self.split == "rows":
            return self.inputs // tp, self.outputs
        least = min(head_size, self.outputs) if self.split == "heads" else 1
        return self.inputs, max(self.outputs // tp, least)

    def weights_on(self, tp: int, head_size: int) -> int:
        inputs, outputs = self.shape_on(tp, head_size)
        return inputs * outputs + (outputs if self.has_bias else 0)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One decoder layer, which all have, and what is before and after them. Sizes of norms are numbers of weights in a
    layer.
    """

    kind: str
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    is_tied: bool
    is_gated: bool
    linears: tuple[Linear, ...]  # of a layer
    num_norms: int  # over hidden states, in a layer
    norm_weights: int  # in a layer, the same on each tensor rank
    split_norm_weights: int = 0  # in a layer, shared out over tensor ranks
    norms_heads: bool = False  # queries and keys are normed too
    is_rms: bool = True
    has_final_norm: bool = True
    position_weights: int = 0
    embedding_size: int | None = None  # where it differs from hidden: OPT's projections
    attention_softcap: bool = False
    window: int | None = None  # how far a token looks back, in `window_share` of the layers
    window_share: float = 0.0
    is_known: bool = True

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Architecture:
        check_no_experts(config)
        kind = str(config.get("model_type", "unknown"))
        if kind == "gemma3" and isinstance(config.get("text_config"), dict):
            return cls.of_config({"model_type": "gemma3_text", **config["text_config"]})
        sizes = {name: _size(config, kind, name) for name in _NAMES}
        if kind == "gpt_neox":
            return _gpt_neox(config, sizes)
        if kind == "opt":
            return _opt(config, sizes)
        return _falcon(config, sizes) if kind == "falcon" else _rotary(config, kind, sizes)

    @property
    def layer_weights(self) -> int:
        return sum(linear.num_weights for linear in self.linears) + self.norm_weights + self.split_norm_weights

    @property
    def embedding_weights(self) -> int:
        """Of the first stage: the table, learned positions, OPT's projection into the layers."""
        size = self.embedding_size or self.hidden
        return self.vocabulary * size + self.position_weights + (size * self.hidden if self.embedding_size else 0)

    @property
    def final_weights(self) -> int:
        """Of the last stage besides the head: the final norm, OPT's projection out of the layers."""
        norm = (self.hidden if self.is_rms else 2 * self.hidden) if self.has_final_norm else 0
        return norm + (self.embedding_size * self.hidden if self.embedding_size else 0)

    @property
    def head_weights(self) -> int:
        return self.vocabulary * (self.embedding_size or self.hidden)

    @property
    def num_parameters(self) -> int:
        own_head = 0 if self.is_tied else self.head_weights
        return self.layers * self.layer_weights + self.embedding_weights + self.final_weights + own_head

    @property
    def queries(self) -> int:
        return self.heads * self.head_size

    def layer_weights_on(self, tp: int) -> int:
        linears = sum(linear.weights_on(tp, self.head_size) for linear in self.linears)
        return linears + self.norm_weights + self.split_norm_weights // tp

    def vocabulary_on(self, tp: int) -> int:
        return -(-self.vocabulary // tp)


def head_cost(model: Architecture, trained_share: float) -> float:
    """Of the head, in layers: only trained tokens are projected to the vocabulary."""
    return model.head_weights / model.layer_weights * trained_share


def check_sizes(config: Mapping[str, Any], file: object) -> None:
    """Refuse sizes of which a model would be built without end, before anything is built or planned."""
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
            f"config.json of this {kind} model has no {_NAMES[what][0]} above 0: a plan needs it, so give a "
            "model that says it"
        )
    return int(value)


def _whole(config: Mapping[str, Any], name: str, default: int) -> int:
    value = config.get(name)
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else default


def _rotary(config: Mapping[str, Any], kind: str, sizes: dict[str, Any]) -> Architecture:
    """Llama and its kin: RMS norms, rotary positions, a gated MLP."""
    hidden, heads = sizes["hidden"], sizes["heads"]
    groups = _whole(config, "num_key_value_heads", heads)
    size = _whole(config, "head_dim", _HEAD_SIZE_BY_DEFAULT.get(kind, hidden // heads))
    inner = _whole(config, "intermediate_size", 4 * hidden)
    bias = bool(config.get("attention_bias", False))
    in_bias, out_bias = (True, False) if kind == "qwen2" else (bias, bias)
    mlp_bias = bool(config.get("mlp_bias", False))
    queries, shared = heads * size, groups * size
    linears: tuple[Linear, ...]
    if kind == "phi3":
        linears = (
            Linear(name="qkv_proj", inputs=hidden, outputs=queries + 2 * shared, split="columns"),
            Linear(name="o_proj", inputs=queries, outputs=hidden, split="rows"),
            Linear(name="gate_up_proj", inputs=hidden, outputs=2 * inner, split="columns"),
            Linear(name="down_proj", inputs=inner, outputs=hidden, split="rows"),
        )
    else:
        linears = (
            Linear(name="q_proj", inputs=hidden, outputs=queries, split="columns", has_bias=in_bias),
            Linear(name="k_proj", inputs=hidden, outputs=shared, split="heads", has_bias=in_bias),
            Linear(name="v_proj", inputs=hidden, outputs=shared, split="heads", has_bias=in_bias),
            Linear(name="o_proj", inputs=queries, outputs=hidden, split="rows", has_bias=out_bias),
            Linear(name="gate_proj", inputs=hidden, outputs=inner, split="columns", has_bias=mlp_bias),
            Linear(name="up_proj", inputs=hidden, outputs=inner, split="columns", has_bias=mlp_bias),
            Linear(name="down_proj", inputs=inner, outputs=hidden, split="rows", has_bias=mlp_bias),
        )
    norms = 4 if kind in ("gemma2", "gemma3_text") else 2
    window, window_share = _window(config, kind, sizes["layers"])
    of_heads = 2 * size if kind in ("qwen3", "gemma3_text") else 0
    return Architecture(
        kind=kind,
        **sizes,
        key_value_heads=groups,
        head_size=size,
        intermediate=inner,
        is_gated=True,
        linears=linears,
        is_tied=_is_tied(config, kind),
        num_norms=norms,
        norm_weights=norms * hidden + of_heads,
        split_norm_weights=queries + shared if kind == "olmo2" else 0,
        norms_heads=kind in ("qwen3", "gemma3_text", "olmo2"),
        attention_softcap=kind == "gemma2" and config.get("attn_logit_softcapping", 50.0) is not None,
        window=window,
        window_share=window_share,
        is_known=kind in _ROTARY_KINDS,
    )


def _window(config: Mapping[str, Any], kind: str, layers: int) -> tuple[int | None, float]:
    """(window, share of the layers that have it)."""
    window = config.get("sliding_window", {"mistral": 4096, "gemma2": 4096, "gemma3_text": 4096}.get(kind))
    if not isinstance(window, int) or (kind in ("qwen2", "qwen3") and not config.get("use_sliding_window", False)):
        return None, 0.0
    types = config.get("layer_types")
    if isinstance(types, list) and types:
        return window, types.count("sliding_attention") / len(types)
    every = (
        _whole(config, "sliding_window_pattern", 6) if kind == "gemma3_text" else 2 if kind == "gemma2" else layers + 1
    )
    return window, (layers - layers // every) / layers


def _gpt_neox(config: Mapping[str, Any], sizes: dict[str, Any]) -> Architecture:
    hidden = sizes["hidden"]
    inner, bias = _whole(config, "intermediate_size", 4 * hidden), bool(config.get("attention_bias", True))
    linears = (
        Linear(name="query_key_value", inputs=hidden, outputs=3 * hidden, split="columns", has_bias=bias),
        Linear(name="dense", inputs=hidden, outputs=hidden, split="rows", has_bias=bias),
        Linear(name="dense_h_to_4h", inputs=hidden, outputs=inner, split="columns", has_bias=True),
        Linear(name="dense_4h_to_h", inputs=inner, outputs=hidden, split="rows", has_bias=True),
    )
    return _plain("gpt_neox", config, sizes, linears, inner, sizes["heads"], num_norms=2)


def _opt(config: Mapping[str, Any], sizes: dict[str, Any]) -> Architecture:
    hidden = sizes["hidden"]
    inner, bias = _whole(config, "ffn_dim", 4 * hidden), bool(config.get("enable_bias", True))
    names = (("q_proj", "columns"), ("k_proj", "columns"), ("v_proj", "columns"), ("out_proj", "rows"))
    linears = (
        *(Linear(name=name, inputs=hidden, outputs=hidden, split=split, has_bias=bias) for name, split in names),
        Linear(name="fc1", inputs=hidden, outputs=inner, split="columns", has_bias=bias),
        Linear(name="fc2", inputs=inner, outputs=hidden, split="rows", has_bias=bias),
    )
    embedding = _whole(config, "word_embed_proj_dim", hidden)
    has_final = bool(config.get("do_layer_norm_before", True)) and not config.get("_remove_final_layer_norm", False)
    return _plain(
        "opt",
        config,
        sizes,
        linears,
        inner,
        sizes["heads"],
        num_norms=2,
        has_final_norm=has_final,
        position_weights=(_whole(config, "max_position_embeddings", 2048) + 2) * hidden,
        embedding_size=embedding if embedding != hidden else None,
    )


def _falcon(config: Mapping[str, Any], sizes: dict[str, Any]) -> Architecture:
    hidden, heads = sizes["hidden"], sizes["heads"]
    size, is_new = hidden // heads, bool(config.get("new_decoder_architecture", False))
    is_single = bool(config.get("multi_query", True)) and not is_new
    groups = 1 if is_single else _whole(config, "num_kv_heads", heads) if is_new else heads
    bias, inner = bool(config.get("bias", False)), _whole(config, "ffn_hidden_size", 4 * hidden)
    linears = (
        Linear(
            name="query_key_value", inputs=hidden, outputs=(heads + 2 * groups) * size, split="columns", has_bias=bias
        ),
        Linear(name="dense", inputs=hidden, outputs=hidden, split="rows", has_bias=bias),
        Linear(name="dense_h_to_4h", inputs=hidden, outputs=inner, split="columns", has_bias=bias),
        Linear(name="dense_4h_to_h", inputs=inner, outputs=hidden, split="rows", has_bias=bias),
    )
    given = config.get("num_ln_in_parallel_attn")
    given = 2 if given is None else int(given)
    norms = given if is_new else (1 if config.get("parallel_attn", True) else 2)
    return _plain("falcon", config, sizes, linears, inner, groups, num_norms=norms)


def _plain(
    kind: str,
    config: Mapping[str, Any],
    sizes: dict[str, Any],
    linears: tuple[Linear, ...],
    inner: int,
    groups: int,
    *,
    num_norms: int,
    **more: Any,
) -> Architecture:
    """Layer norms with biases, and an MLP of two linear layers."""
    hidden = sizes["hidden"]
    return Architecture(
        kind=kind,
        **sizes,
        key_value_heads=groups,
        head_size=hidden // sizes["heads"],
        intermediate=inner,
        is_gated=False,
        linears=linears,
        is_tied=_is_tied(config, kind),
        num_norms=num_norms,
        norm_weights=num_norms * 2 * hidden,
        is_rms=False,
        **more,
    )


def _is_tied(config: Mapping[str, Any], kind: str) -> bool:
    return bool(config.get("tie_word_embeddings", kind in _TIED_BY_DEFAULT))
