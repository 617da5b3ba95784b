"""Finds the parts of a Hugging Face causal LM by inspecting the model, without a table of families."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokenize_data.errors import UserError

# What follows the layers, in the order in which models apply it.
_FINAL_NAMES = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "project_out")


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Names of a causal LM's parts, relative to the whole: `model.layers`, `model.norm`, ..."""

    trunk: str  # the module that owns the layers
    layers: str
    embedding: str
    final: tuple[str, ...]
    head: str
    rotary: str | None
    layer_types: tuple[str | None, ...]  # per layer, the kind of attention that selects its rotary embedding
    rotary_by_type: bool
    is_tied: bool
    logit_softcap: float | None
    logit_multiplier: float

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)


def find_anatomy(model: Any) -> Anatomy:
    """Find the parts of a causal LM on any device, also meta. Raises UserError naming what cannot be found."""
    config, kind = model.config, type(model).__name__
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None:
        raise UserError(
            f"{kind} has no {'embedding' if embedding is None else 'head'} that can be identified: it cannot be "
            "trained here yet"
        )
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers and not _is_within_a_list(name)
    ]
    if len(lists) != 1:
        raise UserError(
            f"{kind}: found {len(lists)} lists of {config.num_hidden_layers} layers, not one: it cannot be "
            "trained here yet"
        )
    layers = lists[0][0]
    trunk = layers.rpartition(".")[0]
    owner = model.get_submodule(trunk)
    if getattr(config, "alibi", False):
        raise UserError(
            f"{kind} with alibi positions cannot be trained here yet: use a base model with rotary positions"
        )
    rotary = getattr(owner, "rotary_emb", None)
    by_type = rotary is not None and "layer_type" in inspect.signature(type(rotary).forward).parameters
    types = getattr(config, "layer_types", None)
    final = tuple(f"{trunk}.{name}" for name in _FINAL_NAMES if isinstance(getattr(owner, name, None), nn.Module))
    return Anatomy(
        trunk=trunk,
        layers=layers,
        embedding=names[id(embedding)],
        final=final,
        head=names[id(head)],
        rotary=names[id(rotary)] if rotary is not None else None,
        layer_types=tuple(types) if types else (None,) * config.num_hidden_layers,
        rotary_by_type=by_type,
        is_tied=bool(config.tie_word_embeddings),
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        logit_multiplier=_logit_multiplier(config),
    )


def _is_within_a_list(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _logit_multiplier(config: Any) -> float:
    """Granite divides the logits, Cohere multiplies them."""
    if (scaling := getattr(config, "logits_scaling", None)) is not None:
        return 1.0 / float(scaling)
    return float(getattr(config, "logit_scale", None) or 1.0)
