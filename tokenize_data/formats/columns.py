"""Rows whose keys and roles have names of their own, which the data set's `columns` say."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tokenize_data.columns import Columns
from tokenize_data.dataset import DatasetSpec
from tokenize_data.errors import RowError, shorten
from tokenize_data.fields import Conversation, Fields, Message
from tokenize_data.formats.interface import RowFormat, as_list
from tokenize_data.formats.turns import CALL, Turns, tools_of
from tokenize_data.json_lines import Row


def _columns(spec: DatasetSpec) -> Columns:
    assert spec.columns is not None
    return spec.columns


def _read(row: Row, fields: Fields) -> Conversation:
    columns = _columns(fields.spec)
    row = _with_tools(row, columns)
    if columns.formatting != "alpaca":
        return _turns(columns)(row, fields)
    messages = [*_system(row, columns, fields), *_history(row, columns, fields)]
    messages.append({"role": "user", "content": _question(row, columns, fields)})
    messages.append({"role": "assistant", "content": fields.text(row, str(columns.response))})
    return Conversation(messages=messages, tools=tools_of(row))


def _with_tools(row: Row, columns: Columns) -> Row:
    """The row with its tools where `tools_of` looks for them."""
    kept = {key: value for key, value in row.items() if key not in ("tools", "functions")}
    return kept if columns.tools is None else {**kept, "tools": row.get(columns.tools)}


def _system(row: Row, columns: Columns, fields: Fields) -> list[Message]:
    key = columns.system
    beside = [{"role": "system", "content": fields.text(row, key)}] if key is not None and row.get(key) else []
    return fields.system(row) or beside


def _history(row: Row, columns: Columns, fields: Fields) -> list[Message]:
    pairs = row.get(columns.history) if columns.history is not None else None
    if pairs is None:
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise RowError(f"'{columns.history}' is {shorten(pairs)}, not a list of pairs of a question and an answer")
    found = []
    for number, pair in enumerate(pairs, 1):
        for role, text in zip(("user", "assistant"), pair, strict=True):
            content = fields.checked(text, f"'{columns.history}' pair {number}, the {role}'s text")
            found.append({"role": role, "content": content})
    return found


def _question(row: Row, columns: Columns, fields: Fields) -> str:
    """The prompt and the query below it, of those that are there and not empty."""
    keys = [key for key in (columns.prompt, columns.query) if key is not None]
    texts = [fields.text(row, key, may_be_empty=True) for key in keys if row.get(key) is not None]
    question = "\n".join(text for text in texts if text)
    return fields.checked(question, " and ".join(f"'{key}'" for key in keys))


@lru_cache(maxsize=32)
def _turns(columns: Columns) -> Turns:
    tags = {
        columns.user_tag: "user",
        columns.assistant_tag: "assistant",
        columns.observation_tag: "tool",
        columns.function_tag: CALL,
        columns.system_tag: "system",
    }
    return Turns(
        key=str(columns.messages),
        role_key=str(columns.role_tag),
        content_key=str(columns.content_tag),
        system_key=columns.system,
        roles={tag: role for tag, role in tags.items() if tag is not None},
    )


def _keys(spec: DatasetSpec) -> str:
    columns = _columns(spec)
    if columns.formatting != "alpaca":
        return f"{columns.messages} with {columns.role_tag} and {columns.content_tag}"
    return f"{', '.join(filter(None, (columns.prompt, columns.query)))} -> {columns.response}"


def _answers(row: Row, spec: DatasetSpec) -> list[Any] | None:
    columns = _columns(spec)
    return as_list(row.get(str(columns.response))) if columns.formatting == "alpaca" else None


def _asked(row: Row, spec: DatasetSpec, answer: str) -> Row | None:
    columns = _columns(spec)
    return None if columns.formatting == "alpaca" else _turns(columns).asked(row, spec, answer)


FORMAT = RowFormat(
    read=_read,
    is_like=lambda rows, spec: spec.columns is not None,
    keys=_keys,
    with_answer=lambda row, spec, answer: {**row, str(_columns(spec).response): answer},
    answers=_answers,
    asked=_asked,
)
