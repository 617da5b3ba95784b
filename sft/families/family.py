"""Everything that can differ between families. The defaults fit Llama and most others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sft.families.architecture import Architecture
from sft.families.counting import rotary

# Small configurations for tests.
SMALL: Mapping[str, Any] = {
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
SMALL_GROUPED: Mapping[str, Any] = {**SMALL, "num_key_value_heads": 2}


def _key_value_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type`. `count` gets the parsed config.json; the other functions get a transformers config object."""

    kind: str  # model_type
    # Planning: the weights, and the activations that layers keep.
    count: Callable[[Mapping[str, Any]], Architecture] = rotary
    # Tensor parallelism: {module within a layer: style}. Set where transformers has no plan, or one that repeats
    # attention on all ranks.
    tensor_plan: Callable[[Any], Mapping[str, str] | None] = lambda config: None
    key_value_heads: Callable[[Any], int] = _key_value_heads
    # False if keys are fused with queries, or normed over all heads: ranks then cannot share a key-value head.
    shares_key_value_heads: bool = True
    # Packed rows: the attention bypasses transformers' attention interface and cannot tell documents apart, so layers
    # get a mask of the whole row, and these options.
    takes_row_mask: bool = False
    layer_options: Mapping[str, Any] = field(default_factory=dict)
    has_position_limit: bool = False  # its position table has max_position_embeddings entries
    # Patterns of tensors in the files that the model does not use, besides those that transformers ignores.
    ignored_tensors: tuple[str, ...] = ()
    # The small model of the self-check: sizes that only this family has, from the config and the small hidden size.
    small_sizes: Callable[[Any, int], Mapping[str, int]] = lambda config, hidden: {}
    # Configurations with different structures, by the names that tests use.
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
