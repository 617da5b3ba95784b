"""Rules for the keys of other trainers' recipes."""

from __future__ import annotations

import difflib
import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sft.config.flags import WORDS
from sft.config.secrets import masked, masked_value
from sft.config.settings import RECIPE_KEYS
from tokenize_data.errors import shorten


class Kind(enum.Enum):
    MAPPED = "mapped"
    WARNED = "warned"  # it has no effect here, or a different one
    REFUSED = "refused"
    OWN = "this project's own key"
    DEFAULT = "not in the recipe"


@dataclass(frozen=True, kw_only=True)
class Line:
    """What becomes of a key: our settings, and a short explanation."""

    key: str
    value: Any = None
    kind: Kind = Kind.MAPPED
    ours: Mapping[str, Any] = field(default_factory=dict)
    comment: str = ""

    @property
    def shown(self) -> str:
        if self.value is None or isinstance(self.value, bool):
            return str(self.value).lower().replace("none", "null")
        return shorten(masked_value(self.value, self.key))


NO_EFFECT = "no effect"  # start of the comment for a key without effect
Rule = Callable[[str, Any, Mapping[str, Any]], Line]  # the key, its value, the whole recipe


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A kind of recipe, recognised by the keys in `marks`."""

    name: str
    rules: Mapping[str, Rule]
    marks: frozenset[str]
    defaults: Callable[[Mapping[str, Any]], dict[str, Any]]


def own_keys() -> frozenset[str]:
    return frozenset(RECIPE_KEYS) | WORDS.keys()


def comment_on(trainer: Trainer, key: str, recipe: Mapping[str, Any]) -> Line:
    value = recipe[key]
    rule = trainer.rules.get(key)
    if rule is None and key in own_keys():
        return Line(key=key, value=value, kind=Kind.OWN, ours={key: value})
    if rule is None:
        close = difflib.get_close_matches(key, [*trainer.rules, *own_keys()], n=1)
        hint = f"did you mean '{close[0]}'?" if close else "take it out"
        return refused(key, value, f"not a key of {trainer.name}'s recipes that is known here: {hint}")
    if value is None:
        return Line(key=key, value=value, comment="not set")
    try:
        return rule(key, value, recipe)
    except _WrongValueError as error:
        return refused(error.key, error.value, str(error))


class _WrongValueError(Exception):
    """A rule found a value that it cannot read, possibly of another key."""

    def __init__(self, key: str, value: Any, wanted: str) -> None:
        super().__init__(f"must be {wanted}")
        self.key, self.value = key, value


def number(key: str, value: Any) -> float:
    """A key's value as a number; `comment_on` refuses anything else."""
    try:
        found = float(value)
    except (ValueError, TypeError, OverflowError):
        raise _WrongValueError(key, value, "a number") from None
    if not math.isfinite(found):
        raise _WrongValueError(key, value, "a number")
    return found


def whole(key: str, value: Any) -> int:
    return int(number(key, value))


def mapping(key: str, value: Any) -> Mapping[str, Any]:
    """A key's value as a mapping; empty if it is not set."""
    if not value:
        return {}
    if not isinstance(value, Mapping):
        raise _WrongValueError(key, value, "a mapping")
    return value


def mapped(key: str, value: Any, ours: Mapping[str, Any], comment: str = "") -> Line:
    return Line(key=key, value=value, ours=ours, comment=masked(comment))


def warned(key: str, value: Any, why: str, ours: Mapping[str, Any] | None = None) -> Line:
    return Line(key=key, value=value, kind=Kind.WARNED, ours=ours or {}, comment=masked(why))


def refused(key: str, value: Any, why: str) -> Line:
    return Line(key=key, value=value, kind=Kind.REFUSED, comment=masked(why))


# ---- rules


def to(name: str, comment: str = "") -> Rule:
    """Rename the key."""
    return lambda key, value, recipe: mapped(key, value, {name: value}, comment)


def no_effect(why: str) -> Rule:
    return lambda key, value, recipe: warned(key, value, f"no effect: {why}")


def only(*allowed: Any, why: str) -> Rule:
    """Accept values that match what we do anyway; refuse others."""

    def rule(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
        return mapped(key, value, {}, "as it is here") if value in allowed else refused(key, value, why)

    return rule


def off(why: str) -> Rule:
    """Refuse an unsupported feature unless it is switched off."""
    return only(False, 0, 0.0, "", "no", "none", [], {}, why=why)


def of_words(name: str, words: Mapping[str, Any], otherwise: str) -> Rule:
    """Translate words."""

    def rule(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
        word = str(value).lower()
        if word not in words:
            return refused(key, value, f"{otherwise}; known are {', '.join(words)}")
        found = words[word]
        return mapped(key, value, found if isinstance(found, dict) else {name: found})

    return rule


def part_of(*others: str) -> Rule:
    """A key that is explained together with another one."""

    def rule(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
        for other in others:
            if recipe.get(other) is not None:
                return mapped(key, value, {}, f"see {other}")
        return warned(key, value, f"no effect without {' or '.join(others)}")

    return rule
