"""The texts of a row by key, checked and cleaned. Every complaint names the value and the remedy."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from tokenize_data import paths
from tokenize_data.dataset import Cleaning, DatasetSpec
from tokenize_data.errors import RowError, shorten
from tokenize_data.json_lines import Row, kind_of

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")

Message = dict[str, Any]


Kind = Literal["chat", "text", "segments"]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What a row says. Without a template its messages are texts, one behind the other: `text` begins with BOS and ends
    with EOS, `segments` are exactly as written.
    """

    messages: list[Message]
    kind: Kind = "chat"
    tools: list[Any] | None = None  # tools for the template


class Fields:
    """Reads the fields of one data set's rows, for the formats."""

    def __init__(self, spec: DatasetSpec) -> None:
        self.spec = spec
        self._clean = spec.clean if spec.clean != Cleaning() else None

    def system(self, row: Row) -> list[Message]:
        """The data set's own system message, if any."""
        spec = self.spec
        if spec.system_key is not None:
            return [{"role": "system", "content": self.text(row, spec.system_key, "system_key")}]
        return [{"role": "system", "content": self.fill(spec.system, row)}] if spec.system is not None else []

    def fill(self, template: str, row: Row) -> str:
        """Fill a prompt template with the row's fields."""

        def value(match: re.Match[str]) -> str:
            if match.group() in ("{{", "}}"):
                return match.group()[0]
            return self.text(row, match.group(1), paths.TEMPLATE, may_be_empty=True)

        text = _FIELD.sub(value, template)
        if not text.strip():
            raise RowError(f"{shorten(template)} gives an empty text: fill its fields, or leave the row out")
        return text

    def text(self, row: Row, key: str, flag: str | None = None, may_be_empty: bool = False) -> str:
        """The text at a key, which may be a path. `flag` names the setting that chose the key, for messages."""
        value = paths.find(row, key, flag)
        if (error := paths.parts_of(value, key, flag)) is not None:
            raise error
        return self.checked(value, f"'{key}'", may_be_empty)

    def checked(self, value: Any, what: str, may_be_empty: bool = False) -> str:
        if not isinstance(value, str):
            raise RowError(
                f"{what} is {kind_of(value)} ({shorten(value)}), not text: write it in quotes, or leave the row out"
            )
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                half = f"\\u{ord(value[error.start]):04x}"
                raise RowError(
                    f"{what} has half of a surrogate pair ({half}) at {error.start}: write the text as UTF-8 again"
                ) from error
        if "\x00" in value:
            raise RowError(f"{what} has a NUL character at {value.index(chr(0))}: remove it")
        if self._clean is not None:
            value = self._clean(value)
        if not may_be_empty and not (value and not value.isspace()):
            cleaned = " after cleaning" if self._clean is not None else ""
            raise RowError(f"{what} is empty{cleaned}: give it a text, or leave the row out")
        text: str = value
        return text
