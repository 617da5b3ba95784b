"""The fields of the configuration as flags of the command line, and back."""

from __future__ import annotations

import argparse
import types
import typing
from dataclasses import MISSING, Field, fields
from typing import Any

from sft.config.train import TrainConfig

_SWITCH: dict[str, Any] = {"action": "store_true"}
# Other ways to say what a field says; `recipe.make_config` turns them into it.
WORDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "loss": (
        "data",
        (
            "completion: learn the answers alone, as --loss_mask 0; full: questions and system messages too, as "
            "--loss_mask 1"
        ),
        {"choices": ("completion", "full"), "metavar": "completion|full"},
    ),
    "load_in_8bit": (
        "adapters",
        "the older name of --weight_only_8bit: it is not LLM.int8(), which rounds activations too",
        _SWITCH,
    ),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each field. None of them has a default here, so that what was typed can be told from what was
    not.
    """
    hints = typing.get_type_hints(TrainConfig)
    groups: dict[str, Any] = {}
    for entry in fields(TrainConfig):
        if entry.metadata.get("flag") is False:
            continue
        name = entry.metadata["group"]
        group = groups.setdefault(name, None) or parser.add_argument_group(name)
        groups[name] = group
        _add_flag(group, entry, hints[entry.name])
    for word, (group_name, text, options) in WORDS.items():
        groups[group_name].add_argument(f"--{word}", default=argparse.SUPPRESS, help=text, **options)


def typed_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was typed, by field or word."""
    names = {entry.name for entry in fields(TrainConfig)} | WORDS.keys()
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(arguments).items()
        if name in names
    }


def _add_flag(group: Any, entry: Field[Any], hint: Any) -> None:
    kind, facts = plain_type(hint), entry.metadata
    shown = (
        ""
        if entry.default in (MISSING, None, ()) or kind is bool
        else f" (default: {entry.default:g})"
        if kind is float
        else ""
    )
    if kind in (int, str) and entry.default not in (MISSING, None):
        shown = f" (default: {entry.default})"
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": (facts["text"] + shown).replace("%", "%%")}
    if kind is bool:
        group.add_argument(f"--{entry.name}", action="store_true", **options)
        if entry.default is not False:  # on, or inferred: there has to be a way to say no
            group.add_argument(
                f"--no_{entry.name}",
                action="store_false",
                dest=entry.name,
                default=argparse.SUPPRESS,
                help="the opposite",
            )
        return
    if kind is tuple:
        options |= {"nargs": "*", "type": str}
    else:
        options |= {"type": kind}
    metavar = "|".join(facts["choices"]) if facts.get("choices") else facts.get("metavar") or entry.name[0].upper()
    group.add_argument(f"--{entry.name}", metavar=metavar, **options)


def plain_type(hint: Any) -> type:
    """int for int | None, tuple for tuple[str, ...], and so on."""
    if isinstance(hint, types.UnionType):
        (hint,) = [part for part in typing.get_args(hint) if part is not type(None)]
    plain: type = typing.get_origin(hint) or hint
    return plain
