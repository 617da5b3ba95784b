"""Settings from flags and recipe."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from typing import Any

from sft.config.flags import WORDS, typed_values
from sft.config.foreign import typed
from sft.config.recipe import combined, make_settings, values_of_fields
from sft.config.settings import FIELDS, Settings
from tokenize_data.flags import plain


def settings_of(arguments: argparse.Namespace, command: str = "train", **unless_given: Any) -> Settings:
    """Settings from flags; the recipe of --config has lower priority. Workers do not repeat warnings."""
    others = typed.values_of(getattr(arguments, "others", []))
    return _made(typed_values(arguments), others, command, unless_given)


def settings_from(values: Mapping[str, Any], caller: str, command: str = "train", **unless_given: Any) -> Settings:
    """Settings from Python values by name, checked like a recipe's. `caller` appears in messages."""
    values = {name: plain(value) for name, value in values.items()}
    config = {"config": values["config"]} if values.get("config") is not None else {}
    own = values_of_fields({name: value for name, value in values.items() if name in FIELDS or name in WORDS}, caller)
    others = {name: value for name, value in values.items() if name not in own and name != "config"}
    return _made({**config, **own}, others, command, unless_given)


def _made(
    values: Mapping[str, Any], others: Mapping[str, Any], command: str, unless_given: Mapping[str, Any]
) -> Settings:
    def warn(line: str) -> None:
        if "RANK" not in os.environ:
            sys.stderr.write(f"sft {command}: warning: {line}\n")

    values = {**unless_given, **combined(values, warn, others)}
    if values.get("load_in_8bit"):
        warn(
            "--load_in_8bit is called --weight_only_8bit now: weights are kept in 8 bits, and activations are "
            "not rounded as by LLM.int8()"
        )
    return make_settings(values)
