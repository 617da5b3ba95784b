"""Writes a tiny random Llama as a Hugging Face folder, without torch, to try a training step."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_HIDDEN, _INNER, _HEADS, _LAYERS = 32, 64, 2, 1
_END = "</s>"


def write_tiny_base(folder: Path) -> None:
    """Write config, weights, and a byte-level tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), _END]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_END])
    tokenizer.save(str(folder / "tokenizer.json"))
    end = len(words) - 1
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(words),
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "num_hidden_layers": _LAYERS,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": "float32",
    }
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    save_file(_weights(len(words)), folder / "model.safetensors", metadata={"format": "pt"})


def _weights(vocabulary_size: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1234)
    shapes = {"model.embed_tokens": (vocabulary_size, _HIDDEN), "lm_head": (vocabulary_size, _HIDDEN)}
    for layer in range(_LAYERS):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{name}_proj": (_HIDDEN, _HIDDEN) for name in "qkvo"}
        shapes |= {f"{block}.mlp.{name}_proj": (_INNER, _HIDDEN) for name in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj"] = (_HIDDEN, _INNER)
    weights = {f"{name}.weight": random.normal(0.0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}
    norms = [f"model.layers.{layer}.{name}" for layer in range(_LAYERS) for name in _NORMS] + ["model.norm"]
    return weights | {f"{name}.weight": np.ones(_HIDDEN, np.float32) for name in norms}


_NORMS = ("input_layernorm", "post_attention_layernorm")
