"""Groups of settings as flags of a command line, and back."""

from __future__ import annotations

import argparse
import json
import os
import typing
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field
from typing import Any

from tokenize_data.settings import Group, fields_of, plain_type


def add_flags(parser: argparse.ArgumentParser, groups: Mapping[str, type[Group]]) -> dict[str, Any]:
    """One flag for each field, under its group's title; returns argparse's groups. Flags have no defaults here, so that
    typed values can be told from others.
    """
    made = {}
    for title, group in groups.items():
        made[title] = parser.add_argument_group(title)
        hints = typing.get_type_hints(group)
        for entry in fields_of(group):
            if entry.metadata.get("flag") is not False:
                _add_flag(made[title], entry, hints[entry.name])
    return made


def typed_values(arguments: argparse.Namespace, names: Collection[str]) -> dict[str, Any]:
    """The typed values, by name."""
    values = {name: value for name, value in vars(arguments).items() if name in names}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def flags_of(group: Group) -> list[str]:
    """The command line for this group. Fields without a flag are left out."""
    words: list[str] = []
    for entry in fields_of(type(group)):
        value = getattr(group, entry.name)
        if entry.metadata.get("flag") is False or value == entry.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{entry.name}" if value else f"--no_{entry.name}")
        else:
            words += [f"--{entry.name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def words_of(values: Mapping[str, Any]) -> list[str]:
    """Make a command line from Python values by name; None is left out."""
    words: list[str] = []
    for name, value in values.items():
        value = plain(value)
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict | bool) else value}")
    return words


def plain(value: Any) -> Any:
    """Convert to a recipe's types: paths become strings, numpy numbers become Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def default_text(entry: Field[Any], kind: type) -> str:
    """The default for help and manual; empty if the text has it or there is none."""
    if entry.default in (MISSING, None, ()) or kind is bool:
        return ""
    return f"{entry.default:g}" if kind is float else str(entry.default)


def metavar_of(entry: Field[Any]) -> str:
    facts = entry.metadata
    return "|".join(facts["choices"]) if facts.get("choices") else facts.get("metavar") or entry.name[0].upper()


def _add_flag(group: Any, entry: Field[Any], hint: Any) -> None:
    kind = plain_type(hint)
    shown = default_text(entry, kind)
    text = entry.metadata["text"] + (f" (default: {shown})" if shown else "")
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if kind is bool:
        group.add_argument(f"--{entry.name}", action="store_true", **options)
        if entry.default is not False:  # on by default, or automatic: there must be a way to switch it off
            no = {"dest": entry.name, "default": argparse.SUPPRESS, "help": "the opposite"}
            group.add_argument(f"--no_{entry.name}", action="store_false", **no)
        return
    options |= {"nargs": "*", "type": str} if kind is tuple else {"type": kind}
    group.add_argument(f"--{entry.name}", metavar=metavar_of(entry), **options)
