"""Flags of `sft`: one per setting, and some aliases."""

from __future__ import annotations

import argparse
from typing import Any

from sft.config.settings import FIELDS, GROUPS
from tokenize_data import flags

_SWITCH: dict[str, Any] = {"action": "store_true"}
# Aliases; `recipe.make_settings` turns them into settings.
WORDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "loss": (
        "objective",
        "completion: learn only the answers, as --loss_mask 0; full: questions and system messages too, as "
        "--loss_mask 1",
        {"choices": ("completion", "full"), "metavar": "completion|full"},
    ),
    "load_in_8bit": (
        "adapters",
        "old name of --weight_only_8bit: it is not LLM.int8(), which quantises activations too",
        _SWITCH,
    ),
}
CONFIG_TEXT = "a YAML recipe with any of these settings; flags override it"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="RECIPE", default=argparse.SUPPRESS, help=CONFIG_TEXT)
    groups = flags.add_flags(parser, GROUPS)
    for word, (title, text, options) in WORDS.items():
        groups[title].add_argument(f"--{word}", default=argparse.SUPPRESS, help=text, **options)


def typed_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """The typed values by setting or alias; `config` is the recipe."""
    return flags.typed_values(arguments, FIELDS.keys() | WORDS.keys() | {"config"})
