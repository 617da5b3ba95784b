"""Rows with a list of messages under any keys, with tools, calls and thoughts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenize_data import paths
from tokenize_data.dataset import DatasetSpec
from tokenize_data.errors import RowError, shorten
from tokenize_data.fields import Conversation, Fields, Message
from tokenize_data.json_lines import Row, kind_of

CHAT_ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")} | {"function": "tool"}
CALL, THOUGHTS = "call", ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Reads the list of messages at `key`."""

    key: str
    role_key: str
    content_key: str
    system_key: str | None = None  # key of an optional system message beside the list
    roles: Mapping[str, str]  # names in the data to our roles; CALL is an assistant's message with just a call

    def __call__(self, row: Row, fields: Fields) -> Conversation:
        messages = self.turns(row, fields)
        if not any(message["role"] == "assistant" for message in messages):
            raise RowError(f"'{self.key}' has no assistant message, so nothing to learn: add one, or leave the row out")
        system = [] if messages[0]["role"] == "system" else fields.system(row) or self._beside(row, fields)
        return Conversation(messages=[*system, *messages], tools=tools_of(row))

    def _beside(self, row: Row, fields: Fields) -> list[Message]:
        key = self.system_key
        return [{"role": "system", "content": fields.text(row, key)}] if key is not None and row.get(key) else []

    def asked(self, row: Row, spec: DatasetSpec, answer: str) -> Row | None:
        """A row whose last message is the user's, with an answer appended."""
        turns = row.get(self.key)
        last = turns[-1] if isinstance(turns, list) and turns else None
        if not isinstance(last, dict) or self.roles.get(str(last.get(self.role_key))) not in ("user", "tool"):
            return None
        assert isinstance(turns, list)
        return {**row, self.key: [*turns, {self.role_key: "assistant", self.content_key: answer}]}

    def turns(self, row: Row, fields: Fields) -> list[Message]:
        turns = row.get(self.key)
        if not isinstance(turns, list):
            raise (
                paths.missing(row, self.key)
                if self.key not in row
                else RowError(f"'{self.key}' is {kind_of(turns)}, not a list of messages")
            )
        if not turns:
            raise RowError(f"'{self.key}' is an empty list: add messages, or leave the row out")
        return [self._message(turn, f"'{self.key}' message {number}", fields) for number, turn in enumerate(turns, 1)]

    def _message(self, turn: Any, place: str, fields: Fields) -> Message:
        if not isinstance(turn, dict):
            raise RowError(f"{place} is {kind_of(turn)}, not an object with '{self.role_key}' and '{self.content_key}'")
        name = turn.get(self.role_key)
        if not isinstance(name, str) or name not in self.roles:
            raise RowError(f"{place} has {self.role_key} {shorten(name)}: use one of {', '.join(self.roles)}")
        further = {
            key: value
            for key, value in turn.items()
            if key not in (self.role_key, self.content_key, "function_call") and value not in (None, [])
        }
        if self.roles[name] == CALL:
            calls = _calls(turn, self.content_key, place)
            return {"role": "assistant", "content": "", **further, "tool_calls": calls}
        calls = further.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
        if calls:
            if self.roles[name] != "assistant" or not isinstance(calls, list):
                raise RowError(
                    f"{place} ({name}) has tool_calls {shorten(calls)}: only an assistant calls, with a list"
                )
            further["tool_calls"] = [_call(call, place) for call in calls]
        thoughts = _thoughts(further, place)
        content = join_parts(turn.get(self.content_key))
        if (calls or thoughts) and content in (None, "") and self.roles[name] == "assistant":
            content = ""
        else:
            content = fields.checked(content, f"{place}: '{self.content_key}'")
        return {"role": self.roles[name], "content": content, **further, **thoughts}


def tools_of(row: Row) -> list[Any] | None:
    """The row's tools in `tools` (`functions` in older data): a list of objects, or JSON of one."""
    given = row.get("tools") or [{"type": "function", "function": one} for one in row.get("functions") or []]
    if isinstance(given, str):
        given = _json(given, "'tools'") if given.strip() else []
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise RowError(f"'tools' is {shorten(given)}, not a list of objects, each with the description of a function")
    return given or None


def _call(given: Any, place: str) -> dict[str, Any]:
    """Convert a call to OpenAI's format, with arguments as an object, as templates expect."""
    inner = given.get("function", given) if isinstance(given, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise RowError(
            f"{place} has the call {shorten(given)}: write an object with the name and arguments of a function"
        )
    arguments = inner.get("arguments", inner.get("parameters", {}))
    arguments = _object(arguments, f"{place}: arguments of '{inner['name']}'") if arguments not in (None, "") else {}
    kept = {key: value for key, value in given.items() if key == "id"}
    return {**kept, "type": "function", "function": {"name": inner["name"], "arguments": arguments}}


def _calls(turn: Mapping[str, Any], key: str, place: str) -> list[dict[str, Any]]:
    """A message that is a call, or a list of calls, as an object or as JSON text."""
    given, what = turn.get(key), f"{place}: '{key}'"
    value = _json(given, what) if isinstance(given, str) else given
    return [_call(_object(one, what), place) for one in (value if isinstance(value, list) and value else [value])]


def _object(given: Any, what: str) -> dict[str, Any]:
    value = _json(given, what) if isinstance(given, str) else given
    if not isinstance(value, dict):
        raise RowError(f"{what} is {kind_of(value)} ({shorten(value)}), not an object")
    return value


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{what} is {shorten(text)}, not JSON: {shorten(error, 80)}") from error


def _thoughts(further: dict[str, Any], place: str) -> Message:
    """Move thoughts from `further` to both names that templates look for."""
    given = [(key, further.pop(key)) for key in THOUGHTS if key in further]
    for key, value in given:
        if not isinstance(value, str):
            raise RowError(f"{place}: '{key}' is {kind_of(value)} ({shorten(value)}), not text")
    text = next((value for _, value in given if value.strip()), None)
    return {} if text is None else {"reasoning_content": text, "thinking": text}


def join_parts(content: Any) -> Any:
    """Join a list of text parts; return anything else unchanged."""
    if isinstance(content, list) and content and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        texts = [part.get("text") for part in content]
        return "".join(texts) if all(isinstance(text, str) for text in texts) else content
    return content
