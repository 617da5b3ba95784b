"""Tiny configurations of every family that training has to get right, with what is peculiar to each: those that the
families' files name.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from sft.families.table import FAMILIES as TABLE

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (kind, dict(values)) for kind, family in TABLE.items() for name, values in family.variants.items()
}


def tiny_config(name: str) -> Any:
    model_type, values = FAMILIES[name]
    return AutoConfig.for_model(model_type, **values)
