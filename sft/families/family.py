"""What can differ from family to family. The defaults are those of Llama and of most others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sft.families.architecture import Architecture
from sft.families.counting import rotary

# Sizes of the small configurations that tests build.
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
    """One `model_type`. Functions get its configuration: `count` as config.json has it, others as an object of
    transformers.
    """

    kind: str  # model_type
    # Planning: its weights, and what its layers keep.
    count: Callable[[Mapping[str, Any]], Architecture] = rotary
    # Tensor ranks: {module within a layer: style}, where transformers has no plan, or one that computes attention on
    # all ranks.
    tensor_plan: Callable[[Any], Mapping[str, str] | None] = lambda config: None
    key_value_heads: Callable[[Any], int] = _key_value_heads
    # False: keys are fused with queries, or normed over all heads, so that a key-value head cannot be on several ranks.
    shares_key_value_heads: bool = True
    # Packed rows: its attention is not called through transformers' interface and knows no documents, so that layers
    # get a mask of the whole row, and these options.
    takes_mask: bool = False
    layer_options: Mapping[str, Any] = field(default_factory=dict)
    ends_positions: bool = False  # it has a table of positions, of max_position_embeddings
    # Tensors in files that the model has no use for, besides those that transformers names: patterns.
    ignored_tensors: tuple[str, ...] = ()
    # A small copy for the check before training: more sizes than those of all families, from the configuration and
    # the small hidden size.
    small_sizes: Callable[[Any, int], Mapping[str, int]] = lambda config, hidden: {}
    # Configurations that differ in structure, by the names that tests have for them.
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
