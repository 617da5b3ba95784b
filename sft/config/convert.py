"""Converts another trainer's recipe to one of ours, with a comment for each key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft.config import foreign
from sft.config.foreign import Kind, Line
from sft.config.recipe import checked, key_lines
from tokenize_data.errors import UserError
from tokenize_data.recipe_file import read_recipe_file


def convert(file: Path) -> tuple[str, str | None]:
    """Returns (our recipe as text, why it cannot run or None)."""
    read: list[dict[str, Any]] = []  # the file itself comes last, still with its nulls

    def keep(own: dict[str, Any], _: Path) -> dict[str, Any]:
        read.append(own)
        return {}

    read_recipe_file(file, keep, flag="recipe")
    content = read[-1]
    if not foreign.is_foreign(content):
        raise UserError(f"{file} has no key of another trainer's recipe: `sft --config {file}` runs it as it is")
    lines = foreign.lines_of(content, file)
    return _text(lines, file), foreign.refusal(lines)


def _text(lines: Sequence[Line], file: Path) -> str:
    out = [f"# From {file.name}: sft --config NEW.yaml"]
    last = {
        name: number for number, line in enumerate(lines) for name in line.ours
    }  # a later key overrides an earlier one, as in a run
    said_default = False
    for number, line in enumerate(lines):
        if line.kind is Kind.DEFAULT and not said_default:
            out += ["", "# What the other trainer does unless it is told otherwise."]
            said_default = True
        ours = {name: value for name, value in line.ours.items() if last[name] == number}
        out += _lines(line, ours)
    checked({name: value for line in lines for name, value in line.ours.items()}, str(file))
    return "\n".join(out) + "\n"


def _lines(line: Line, ours: Mapping[str, Any]) -> list[str]:
    there = f"{line.key}: {line.shown}"
    if line.kind is Kind.REFUSED:
        return [f"# refused: {there}: {line.comment}"]
    if not ours:
        return [f"# {'' if line.kind is not Kind.WARNED else 'warning: '}{there}: {line.comment or 'nothing to set'}"]
    if line.kind is Kind.OWN:
        return [text for name, value in ours.items() for text in key_lines(name, value)]
    comment = (
        line.comment
        if line.kind is Kind.DEFAULT
        else "; ".join(part for part in (f"was {there}", line.comment) if part)
    )
    comment = f"warning: {comment}" if line.kind is Kind.WARNED else comment
    first, *others = ours.items()
    return [
        *key_lines(*first, comment),
        *(text for name, value in others for text in key_lines(name, value, f"was {line.key}")),
    ]
