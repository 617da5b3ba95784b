"""The families that have a file, by `model_type`. All others are treated like Llama."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from sft.families.architecture import Architecture
from sft.families.counting import rotary
from sft.families.experts import check_no_experts
from sft.families.family import Family
from sft.families.sizes import kind_of

FAMILIES: dict[str, Family] = {}


def register(*families: Family) -> None:
    """Add families to the table. Each family's file calls this on import; `sft/families/__init__.py` imports them."""
    FAMILIES.update({family.kind: family for family in families})


def family_of(kind: str) -> Family:
    return FAMILIES.get(kind) or Family(kind=kind, count=partial(rotary, is_known=False))


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a config.json. Without a file, `is_known` is False and Llama's structure is used."""
    check_no_experts(config)
    return family_of(kind_of(config)).count(config)
