"""Settings from flags and recipe, on this machine."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from sft.config.flags import typed_values
from sft.config.foreign import typed
from sft.config.recipe import combined, make_settings
from sft.config.settings import Settings


def settings_of(arguments: argparse.Namespace, command: str = "train", **unless_given: Any) -> Settings:
    """The configuration that flags ask for, with the recipe of --config below them. Workers repeat no warning."""

    def warn(line: str) -> None:
        if "RANK" not in os.environ:
            sys.stderr.write(f"sft {command}: warning: {line}\n")

    others = typed.values_of(getattr(arguments, "others", []))
    values = {**unless_given, **combined(typed_values(arguments), warn, others)}
    if values.get("load_in_8bit"):
        warn(
            "--load_in_8bit is called --weight_only_8bit now: weights are kept in 8 bits, and activations are "
            "not rounded as by LLM.int8()"
        )
    return make_settings(values)
