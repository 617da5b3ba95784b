"""Tiny configurations of every family that training has to get right, with what is peculiar to each."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

_SMALL = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROTARY = {**_SMALL, "num_key_value_heads": 2}
_OPT = {
    "hidden_size": 48,
    "ffn_dim": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FALCON = {**_SMALL, "bias": False, "alibi": False, "hidden_dropout": 0.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _ROTARY),
    "llama1": ("llama", {**_SMALL, "num_key_value_heads": 4}),
    "llama3-tied": (
        "llama",
        {**_ROTARY, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    "llama-biases": ("llama", {**_ROTARY, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {**_ROTARY, "sliding_window": None}),
    "mistral-window": ("mistral", {**_ROTARY, "sliding_window": 8}),
    "gemma": ("gemma", {**_ROTARY, "head_dim": 16}),
    "gemma2": ("gemma2", {**_ROTARY, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 20}),
    "gemma3": (
        "gemma3_text",
        {**_ROTARY, "head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 20},
    ),
    "gpt-neox": ("gpt_neox", {**_SMALL, "hidden_dropout": 0.0, "rotary_pct": 0.5}),
    "opt": ("opt", _OPT),
    "opt-350m": ("opt", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "falcon": ("falcon", {**_FALCON, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True}),
    "falcon-new": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "qwen2": ("qwen2", _ROTARY),
    "qwen3": ("qwen3", {**_ROTARY, "head_dim": 16}),
    "phi3": ("phi3", {**_ROTARY, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "olmo2": ("olmo2", _ROTARY),
    "granite": (
        "granite",
        {
            **_ROTARY,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
}


def tiny_config(name: str) -> Any:
    model_type, values = FAMILIES[name]
    return AutoConfig.for_model(model_type, **values)
