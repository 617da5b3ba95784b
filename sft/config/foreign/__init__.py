"""Recipes of other trainers, each of their keys mapped, refused by name, or warned about. None is dropped without a
word.

In reading order: rules (what can be said of a key), shared (keys that both kinds have), schedules, trl
(alignment-handbook, TRL), flat (the config.yml of notebook-style trainers, with TRL's keys besides), data (their data
sets), typed (their keys as flags). Does not belong here: this project's own keys, which are `recipe`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sft.config.foreign import flat, trl
from sft.config.foreign.rules import NO_EFFECT, Kind, Line, Trainer, comment_on, own_keys
from tokenize_data.errors import UserError
from tokenize_data.recipe_file import RIVALS

TRAINERS: tuple[Trainer, ...] = (trl.TRAINER, flat.TRAINER)
_MOST_SHOWN = 6
_NOTHING: Mapping[str, Any] = MappingProxyType({})

__all__ = ["Kind", "Line", "is_foreign", "lines_of", "refusal", "translated"]


def is_foreign(content: Mapping[str, Any]) -> bool:
    return _trainer(content) is not None


def lines_of(content: Mapping[str, Any], file: Path) -> list[Line]:
    """What becomes of each key, in order, followed by the other trainer's defaults that differ from ours."""
    trainer = _trainer(content)
    assert trainer is not None
    lines = [comment_on(trainer, key, content) for key in content]
    if all("run_name" not in line.ours for line in lines):
        name = Path(str(content.get("output_dir") or file.resolve().stem)).name
        lines.append(
            Line(
                key="run_name",
                kind=Kind.DEFAULT,
                ours={"run_name": trl.run_name_of(name)},
                comment="named after output_dir or file",
            )
        )
    said = {name for line in lines for name in line.ours}
    said |= {name for pair in RIVALS if said & set(pair) for name in pair}  # two keys for one setting
    for name, value in trainer.defaults(content).items():
        if name not in said:
            lines.append(Line(key=name, kind=Kind.DEFAULT, ours={name: value}, comment=f"{trainer.name}'s default"))
    return lines


def translated(
    content: dict[str, Any], file: Path, warn: Callable[[str], None], typed: Mapping[str, Any] = _NOTHING
) -> dict[str, Any]:
    """Translate to our settings. All refused keys are named in one error. `typed` are that trainer's keys given as
    flags; they override the recipe.
    """
    lines = lines_of({key: value for key, value in content.items() if key not in typed} | dict(typed), file)
    if (reason := refusal(lines)) is not None:
        raise UserError(f"{file}: {reason}")
    idle = [line for line in lines if line.kind is Kind.WARNED and line.comment.startswith(NO_EFFECT)]
    for line in lines:
        if line.kind is Kind.WARNED and (line not in idle or len(idle) == 1):
            where = f"--{line.key}" if line.key in typed else f"{file}: {line.key}"
            warn(f"{where}: {line.shown}: {line.comment}")
    if len(idle) > 1:
        names = ", ".join(line.key for line in idle)
        warn(f"{file}: {len(idle)} keys have no effect here: {names}: `sft convert-recipe {file}` says why")
    values: dict[str, Any] = {}
    for line in lines:
        values |= line.ours
    return values


def refusal(lines: list[Line]) -> str | None:
    """Why a recipe cannot run: all refused keys in one line."""
    refused = [f"{line.key}: {line.shown}: {line.comment}" for line in lines if line.kind is Kind.REFUSED]
    if not refused:
        return None
    more = f"; and {len(refused) - _MOST_SHOWN} more" if len(refused) > _MOST_SHOWN else ""
    return f"cannot be run as it is: {'; '.join(refused[:_MOST_SHOWN])}{more}"


def _trainer(content: Mapping[str, Any]) -> Trainer | None:
    """The trainer that most of the foreign keys belong to."""
    known = own_keys()
    counts = {trainer.name: sum(key in trainer.marks and key not in known for key in content) for trainer in TRAINERS}
    best = max(TRAINERS, key=lambda trainer: counts[trainer.name])
    return best if counts[best.name] else None
