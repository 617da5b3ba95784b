"""Llama, and families with the same structure."""

from sft.families.family import SMALL, SMALL_GROUPED, Family
from sft.families.table import register

_LLAMA3 = {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
_GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}

register(
    Family(
        kind="llama",
        variants={
            "llama": SMALL_GROUPED,
            "llama1": {**SMALL, "num_key_value_heads": 4},
            "llama3-tied": {**SMALL_GROUPED, **_LLAMA3},
            "llama-biases": {**SMALL_GROUPED, "attention_bias": True, "mlp_bias": True},
        },
    ),
    Family(kind="granite", variants={"granite": {**SMALL_GROUPED, **_GRANITE}}),
)
