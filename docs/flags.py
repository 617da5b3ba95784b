"""The reference of flags, from the settings themselves: `python docs/flags.py > docs/flags.md`."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from sft.cli import COMMANDS
from sft.config.flags import CONFIG_TEXT, WORDS
from sft.config.settings import FIELDS, GROUPS, HINTS
from tokenize_data.cli import make_parser as data_parser
from tokenize_data.errors import OneLineParser
from tokenize_data.flags import default_text, metavar_of
from tokenize_data.settings import fields_of, plain_type

_TOP = """# Flags

<!-- Made by `python docs/flags.py > docs/flags.md`. Change the settings, not this page. -->

Every setting of a run is a flag of `sft train` and `sft plan`, and a key of a [recipe](recipes.md) under the same name.
Flags override the recipe. `sft train -h` prints the same list.

Where the default is empty, the setting is off or not needed. Where it is "automatic", it depends on the run: `sft plan`
shows it.
"""
_DEFAULT = re.compile(r" \(default: (.*)\)$")
_TITLES = {
    "data": "Data",
    "model": "Base model",
    "objective": "Objective",
    "schedule": "Schedule",
    "optimizer": "Optimizer",
    "adapters": "Adapters",
    "layout": "Layout and memory",
    "machine": "Machine",
    "output": "Output",
}
_SETTINGS_ALONE = ("train", "plan")  # the rest of their flags are the settings


def page() -> str:
    lines = [_TOP]
    for title, group in GROUPS.items():
        lines += [f"## {_TITLES[title]}", "", "| flag | values | default | meaning |", "|---|---|---|---|"]
        lines += [_row(*_setting(entry.name)) for entry in fields_of(group)]
        lines += [_word(word) for word, (place, *_) in WORDS.items() if place == title]
        lines.append("")
    lines += ["## Recipe", "", "| flag | default | meaning |", "|---|---|---|"]
    lines += [_row("`--config RECIPE`", "", CONFIG_TEXT), ""]
    for name, parser in command_parsers().items():
        rows = list(_own_flags(name, parser))
        if rows:
            lines += [f"## `{name}`", "", _sentence(parser.description or ""), ""]
            lines += ["| argument | values | meaning |", "|---|---|---|", *rows, ""]
    return "\n".join(lines).rstrip() + "\n"


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """By the words that start a command: `sft train`, ..., `tokenize_data`."""
    parsers: dict[str, argparse.ArgumentParser] = {}
    for name, text in COMMANDS.items():
        parser = OneLineParser(prog=f"sft {name}", description=text, allow_abbrev=False)
        importlib.import_module(f"sft.commands.{name.replace('-', '_')}").add_flags(parser)
        parsers[f"sft {name}"] = parser
    return {**parsers, "tokenize_data": data_parser()}


def _word(word: str) -> str:
    _, text, options = WORDS[word]
    return _row(f"`--{word}`", _values(options.get("choices", ())), "", text)


def _setting(name: str) -> tuple[str, str, str, str]:
    """(flag, values, default, meaning)."""
    entry, kind = FIELDS[name], plain_type(HINTS[name])
    text, choices = str(entry.metadata["text"]), entry.metadata.get("choices") or ()
    if entry.metadata.get("flag") is False:
        return f"`{name}:`", "", "", f"{text}; in recipes only"
    if kind is bool:
        shown = f"`--{name}`" if entry.default is False else f"`--{name}`, `--no_{name}`"
        default = {False: "off", True: "on", None: "automatic"}[entry.default]
    else:
        several = " ..." if kind is tuple else ""
        takes = name[0].upper() if choices else metavar_of(entry)
        shown, default = f"`--{name} {takes}{several}`", _default(name, kind)
    if (said := _DEFAULT.search(text)) is not None:
        text, default = text[: said.start()], said.group(1)
    note = "; not in recipes" if entry.metadata.get("recipe") is False else ""
    return shown, _values(choices), default, text + note


def _default(name: str, kind: type) -> str:
    entry = FIELDS[name]
    if name == "run_name":
        return "required"
    if isinstance(entry.default, tuple):
        return " ".join(f"`{value}`" for value in entry.default)
    shown = default_text(entry, kind)
    return f"`{shown}`" if shown else ""


def _own_flags(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    known = {f"--{field}" for field in FIELDS} | {f"--no_{field}" for field in FIELDS} | {f"--{word}" for word in WORDS}
    alone = name.removeprefix("sft ") in _SETTINGS_ALONE or name == "tokenize_data"
    for action in parser._actions:
        if action.dest == "help" or (alone and (set(action.option_strings) & {*known, "--config"})):
            continue
        yield _row(f"`{_shown(action)}`", _values(action.choices or ()), str(action.help or "").replace("%%", "%"))


def _shown(action: argparse.Action) -> str:
    metavar = action.metavar or action.dest.upper()
    value = " ".join(metavar) if isinstance(metavar, tuple) else metavar
    if not action.option_strings:
        return value
    return f"{action.option_strings[0]} {value}" if action.nargs != 0 else action.option_strings[0]


def _values(choices: Iterable[Any]) -> str:
    return ", ".join(f"`{choice}`" for choice in choices)


def _sentence(text: str) -> str:
    text = text.strip().replace("\n", " ")
    return f"{text[:1].upper()}{text[1:]}".rstrip(".") + "."


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    sys.stdout.write(page())
