"""Rows with a list of messages, whatever its keys are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenize_data.errors import RowError, shorten
from tokenize_data.fields import Fields, Message
from tokenize_data.json_lines import Row, kind_of


@dataclass(frozen=True, kw_only=True)
class Turns:
    key: str
    role_key: str
    content_key: str
    roles: Mapping[str, str]  # the data's name to ours

    def __call__(self, row: Row, fields: Fields) -> list[Message]:
        turns = row.get(self.key)
        if not isinstance(turns, list):
            raise (
                fields.missing(row, self.key)
                if self.key not in row
                else RowError(f"'{self.key}' is {kind_of(turns)}, not a list of messages")
            )
        messages = []
        for number, turn in enumerate(turns, 1):
            place = f"'{self.key}' message {number}"
            if not isinstance(turn, dict):
                raise RowError(
                    f"{place} is {kind_of(turn)}, not an object with '{self.role_key}' and '{self.content_key}'"
                )
            name = turn.get(self.role_key)
            if not isinstance(name, str) or name not in self.roles:
                raise RowError(f"{place} has {self.role_key} {shorten(name)}: use one of {', '.join(self.roles)}")
            if turn.get("tool_calls"):
                raise RowError(
                    f"{place} has tool_calls, which cannot be trained on: write them into its {self.content_key}"
                )
            content = _join_parts(turn.get(self.content_key))
            message = {"role": self.roles[name], "content": fields.checked(content, f"{place}: '{self.content_key}'")}
            message.update(
                {k: v for k, v in turn.items() if k not in (self.role_key, self.content_key) and v is not None}
            )
            messages.append(message)
        if not any(message["role"] == "assistant" for message in messages):
            raise RowError(f"'{self.key}' has no assistant message, so nothing to learn: add one, or leave the row out")
        if messages[0]["role"] == "system":
            return messages
        return [*fields.system(row), *messages]


def _join_parts(content: Any) -> Any:
    if isinstance(content, list) and content and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        texts = [part.get("text") for part in content]
        return "".join(texts) if all(isinstance(text, str) for text in texts) else content
    return content
