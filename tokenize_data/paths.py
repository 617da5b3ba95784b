"""Keys of a row that lead into it: `answer.value`, `answers.text[0]`. A key that a row has as it is written goes first.

Every complaint names the part that is missing, what is there instead, and the remedy.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

from tokenize_data.errors import RowError, shorten
from tokenize_data.json_lines import Row, kind_of

TEMPLATE = "template"  # the key comes from a prompt template instead of a flag

_PATH = re.compile(r"[^.\[\]]+(?:\[-?\d+\]|\.[^.\[\]]+)*")
_INDEX = re.compile(r"\[(-?\d+)\]")
_END = re.compile(r"[.\[]")
_MOST_SHOWN = 8
_FILL = "give it an entry, or leave the row out"


class _LostError(Exception):
    """A path does not exist in a row."""

    def __init__(self, done: str, step: str, rest: str, value: Any) -> None:
        super().__init__(done, step)
        self.done, self.step, self.rest, self.value = done, step, rest, value  # `value` has no `step`; `rest` is behind


def has(row: Row, key: str) -> bool:
    if key in row:
        return True
    try:
        _follow(row, key)
    except _LostError:
        return False
    return True


def find(row: Row, key: str, flag: str | None = None) -> Any:
    """The value of a key. `flag` names the setting that chose the key, for messages; TEMPLATE, a prompt template."""
    if key in row:
        return row[key]
    try:
        return _follow(row, key)
    except _LostError as lost:
        raise _error(lost, row, key, flag) from None


def missing(row: Row, key: str, flag: str | None = None) -> RowError:
    """The error for a row without this key."""
    shown, close = _names(row), _close(key, row)
    if close and flag:
        return RowError(f"no key '{key}': did you mean '{close}'? {_sentence(_use(close, flag))}; the row has {shown}")
    if close:
        return RowError(f"no key '{key}': did you mean '{close}'? The row has {shown}")
    remedy = f": name the right one with --{flag}" if flag and flag != TEMPLATE else ""
    return RowError(f"no key '{key}'; the row has {shown}{remedy}")


def parts_of(value: Any, key: str, flag: str | None) -> RowError | None:
    """Suggest a part of a list or object that is in place of a text. None for other values."""
    if flag is None or not isinstance(value, list | dict):
        return None
    if not value:
        kind = "an empty list" if isinstance(value, list) else "an empty object"
        return RowError(f"'{key}' is {kind}: write a text there, or leave the row out")
    inner = f"{key}[0]" if isinstance(value, list) else f"{key}.{next(iter(value))}"
    which = "its first entry" if isinstance(value, list) else f"one of its keys ({_names(value)})"
    return RowError(
        f"'{key}' is {kind_of(value)} ({shorten(value)}), not text: {_use(inner, flag)} for {which}, or leave "
        "the row out"
    )


def _follow(row: Row, key: str) -> Any:
    if _PATH.fullmatch(key) is None:
        raise _LostError("", key, "", row)
    value: Any = row
    rest, done = key, ""
    while rest:
        index = _INDEX.match(rest)
        if index is not None:
            step, rest = index.group(), rest[index.end() :]
            number = int(index.group(1))
            if not isinstance(value, list) or not -len(value) <= number < len(value):
                raise _LostError(done, step, rest, value)
            value, done = value[number], done + step
            continue
        rest = rest.removeprefix(".")
        name = _name(value, rest)
        step, rest = name, rest[len(name) :]
        if not isinstance(value, dict) or name not in value:
            raise _LostError(done, step, rest, value)
        value, done = value[name], f"{done}.{name}" if done else name
    return value


def _name(value: Any, rest: str) -> str:
    """The key with which the rest of a path starts: all of it, else the shortest existing one."""
    ends = [found.start() for found in _END.finditer(rest)]
    names = [rest, *(rest[:end] for end in ends)]
    shortest = rest[: ends[0]] if ends else rest
    return next((name for name in names if isinstance(value, dict) and name in value), shortest)


def _error(lost: _LostError, row: Row, key: str, flag: str | None) -> RowError:
    if not lost.done and lost.step == key:
        return missing(row, key, flag)
    return RowError(f"no '{key}': {_what(lost, flag)}")


def _what(lost: _LostError, flag: str | None) -> str:
    place, step, value = f"'{lost.done}'", lost.step, lost.value
    is_index = step.startswith("[")
    if isinstance(value, dict) and not is_index:
        holder = place if lost.done else "the row"
        close = _close(step, value)
        use = _sentence(_use(f"{lost.done}.{close}{lost.rest}".removeprefix("."), flag))
        hint = f": did you mean '{close}'? {use}; {holder} has" if close else ", which has"
        return f"no key '{step}' in {holder}{hint} {_names(value)}{'' if close else _other(flag)}"
    if isinstance(value, list):
        count = "an empty list" if not value else f"a list of {len(value):,}"
        if not is_index:
            inner = f"{lost.done}[0].{step}{lost.rest}"
            remedy = f"{_use(inner, flag)}, or leave the row out" if value else "leave the row out"
            return f"{place} is {count}, so it has no '{step}': {remedy}"
        most = f"{lost.done}[{len(value) - 1}]{lost.rest}"
        remedy = f"{_use(most, flag)} for its last entry, or leave the row out" if value else _FILL
        return f"{place} is {count}, so it has no {step}: {remedy}"
    shown = kind_of(value) if value is None or isinstance(value, dict) else f"{kind_of(value)} ({shorten(value)})"
    if isinstance(value, dict):
        inner = f"{lost.done}.{next(iter(value), '...')}{lost.rest}"
        return f"{place} is {shown} with {_names(value)}, not a list: {_use(inner, flag)}, or leave the row out"
    wanted, asked = ("a list", step) if is_index else ("an object", f"'{step}'")
    otherwise = f"{_use(lost.done, flag)}, or " if isinstance(value, str) else ""
    return f"{place} is {shown}, not {wanted}, so it has no {asked}: {otherwise}leave the row out"


def _use(key: str, flag: str | None) -> str:
    if flag == TEMPLATE:
        return f"write {{{key}}}"
    return f"use --{flag} {key}" if flag else f"use '{key}'"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _other(flag: str | None) -> str:
    return f": name the right one with --{flag}" if flag and flag != TEMPLATE else ": name one of them"


def _names(row: Row) -> str:
    return ", ".join(shorten(name) for name in list(row)[:_MOST_SHOWN]) or "no keys"


def _close(name: str, row: Row) -> str | None:
    return next(iter(difflib.get_close_matches(name, row, n=1, cutoff=0.6)), None)
