"""Rows to conversations: formats, keys, prompt templates, cleaning. Every complaint names the value and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tokenize_data.errors import RowError, UserError, shorten
from tokenize_data.json_lines import Row, kind_of

FORMATS = ("qa", "chat", "sharegpt", "alpaca", "text")
DEFAULT_QUESTION_KEY, DEFAULT_ANSWER_KEY = "prompt", "gold"
_KNOWN_ROLES = ("system", "developer", "user", "assistant")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
}
_ALPACA_PROMPT = "{instruction}\n\n{input}"
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """What is done to a data set's own texts before a prompt template is filled."""

    drop: str | None = None
    lower: bool = False
    strip: bool = False

    def __post_init__(self) -> None:
        if self.drop is not None:
            try:
                re.compile(self.drop)
            except re.error as error:
                raise UserError(
                    f"clean: drop: {self.drop!r} is not a regular expression ({error}): write a class such as "
                    "[^a-zA-Z0-9\\s]"
                ) from error

    def __call__(self, text: str) -> str:
        text = re.sub(self.drop, "", text) if self.drop else text
        text = text.lower() if self.lower else text
        return text.strip() if self.strip else text


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One data set of a run: its files, how to read its rows, and how much of it to take."""

    files: tuple[str, ...]
    name: str = ""
    format: str | None = None
    question_key: str = DEFAULT_QUESTION_KEY
    answer_key: str = DEFAULT_ANSWER_KEY
    system_key: str | None = None
    text_key: str = "text"
    prompt: str | None = None
    answer: str | None = None
    system: str | None = None
    weight: float = 1.0
    samples: int | None = None
    clean: Cleaning = Cleaning()

    def __post_init__(self) -> None:
        if not self.files:
            raise UserError(f"data set '{self.name}' has no files: give at least one")
        if self.format is not None and self.format not in FORMATS:
            raise UserError(f"unknown format '{self.format}': use one of {', '.join(FORMATS)}")
        if not 0 < self.weight < float("inf"):
            raise UserError(f"data set '{self.name}': weight {self.weight} must be above 0")
        if self.samples is not None and self.samples < 1:
            raise UserError(f"data set '{self.name}': samples {self.samples} must be at least 1")
        if self.samples is not None and self.weight != 1.0:
            raise UserError(
                f"data set '{self.name}' has samples {self.samples} and weight {self.weight}: give one of them"
            )

    def reading(self) -> dict[str, Any]:
        """What of this decides a row's text; a manifest keeps it."""
        return {key: value for key, value in asdict(self).items() if key not in ("files", "name")}


class RowReader:
    """Rows of one data set to messages."""

    def __init__(self, spec: DatasetSpec, format_name: str) -> None:
        self._spec = spec
        self._read: Callable[[Row], list[Message]] = getattr(self, f"_{format_name}")
        self.is_plain_text = format_name == "text"
        clean = spec.clean
        self._clean = clean if clean != Cleaning() else None

    def messages(self, row: Row) -> list[Message]:
        """The conversation of a row; for plain text one message whose role is `assistant`, as all of it is trained."""
        return self._read(row)

    def _qa(self, row: Row) -> list[Message]:
        spec = self._spec
        question = (
            self._fill(spec.prompt, row)
            if spec.prompt is not None
            else self._field(row, spec.question_key, "question_key")
        )
        answer = (
            self._fill(spec.answer, row) if spec.answer is not None else self._field(row, spec.answer_key, "answer_key")
        )
        return [*self._system(row), {"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def _alpaca(self, row: Row) -> list[Message]:
        instruction = self._field(row, "instruction")
        has_input = isinstance(row.get("input"), str) and row["input"].strip()
        if self._spec.prompt is not None:
            question = self._fill(self._spec.prompt, row)
        else:
            question = self._fill(_ALPACA_PROMPT, row) if has_input else instruction
        return [
            *self._system(row),
            {"role": "user", "content": question},
            {"role": "assistant", "content": self._field(row, "output")},
        ]

    def _text(self, row: Row) -> list[Message]:
        return [{"role": "assistant", "content": self._field(row, self._spec.text_key, "text_key")}]

    def _chat(self, row: Row) -> list[Message]:
        return self._conversation(row, "messages", "role", "content", {role: role for role in _KNOWN_ROLES})

    def _sharegpt(self, row: Row) -> list[Message]:
        return self._conversation(row, "conversations", "from", "value", _SHAREGPT_ROLES)

    def _conversation(
        self, row: Row, key: str, role_key: str, content_key: str, roles: dict[str, str]
    ) -> list[Message]:
        turns = row.get(key)
        if not isinstance(turns, list):
            raise (
                self._missing(row, key)
                if key not in row
                else RowError(f"'{key}' is {kind_of(turns)}, not a list of messages")
            )
        messages = []
        for number, turn in enumerate(turns, 1):
            place = f"'{key}' message {number}"
            if not isinstance(turn, dict):
                raise RowError(f"{place} is {kind_of(turn)}, not an object with '{role_key}' and '{content_key}'")
            name = turn.get(role_key)
            if not isinstance(name, str) or name not in roles:
                raise RowError(f"{place} has {role_key} {shorten(name)}: use one of {', '.join(roles)}")
            if turn.get("tool_calls"):
                raise RowError(f"{place} has tool_calls, which cannot be trained on: write them into its {content_key}")
            content = _join_parts(turn.get(content_key))
            message = {"role": roles[name], "content": self._checked(content, f"{place}: '{content_key}'")}
            message.update({k: v for k, v in turn.items() if k not in (role_key, content_key) and v is not None})
            messages.append(message)
        if not any(message["role"] == "assistant" for message in messages):
            raise RowError(f"'{key}' has no assistant message, so nothing to learn: add one, or leave the row out")
        if messages[0]["role"] == "system":
            return messages
        return [*self._system(row), *messages]

    def _system(self, row: Row) -> list[Message]:
        spec = self._spec
        if spec.system_key is not None:
            return [{"role": "system", "content": self._field(row, spec.system_key, "system_key")}]
        return [{"role": "system", "content": self._fill(spec.system, row)}] if spec.system is not None else []

    def _fill(self, template: str, row: Row) -> str:
        def value(match: re.Match[str]) -> str:
            if match.group() in ("{{", "}}"):
                return match.group()[0]
            return self._field(row, match.group(1), may_be_empty=True)

        text = _FIELD.sub(value, template)
        if not text.strip():
            raise RowError(f"{shorten(template)} gives an empty text: fill its fields, or leave the row out")
        return text

    def _field(self, row: Row, key: str, flag: str | None = None, may_be_empty: bool = False) -> str:
        if key not in row:
            raise self._missing(row, key, flag)
        return self._checked(row[key], f"'{key}'", may_be_empty)

    def _checked(self, value: Any, what: str, may_be_empty: bool = False) -> str:
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
                    f"{what} has half a character ({half}) at {error.start}: write the text as UTF-8 again"
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

    def _missing(self, row: Row, key: str, flag: str | None = None) -> RowError:
        has = ", ".join(f"'{name}'" for name in list(row)[:8]) or "no keys"
        close = difflib.get_close_matches(key, row, n=1, cutoff=0.6)
        if close and flag:
            return RowError(f"no key '{key}': did you mean '{close[0]}'? Use --{flag} {close[0]}; the row has {has}")
        if close:
            return RowError(f"no key '{key}': did you mean '{close[0]}'? The row has {has}")
        return RowError(f"no key '{key}'; the row has {has}" + (f": name the right one with --{flag}" if flag else ""))


def recognise(rows: Sequence[Row], spec: DatasetSpec) -> str:
    """The format of a data set, from its first rows. What the user named by key goes first."""
    if spec.format is not None:
        return spec.format
    named = (spec.question_key, spec.answer_key) != (DEFAULT_QUESTION_KEY, DEFAULT_ANSWER_KEY)
    if named or spec.prompt is not None or _all_have(rows, (spec.question_key, spec.answer_key)):
        return "qa"
    if _all_have(rows, ("messages",)):
        return "chat"
    if _all_have(rows, ("conversations",)):
        return "sharegpt"
    if _all_have(rows, ("instruction", "output")):
        return "alpaca"
    if _all_have(rows, (spec.text_key,)):
        return "text"
    return "qa"


def _all_have(rows: Iterable[Row], keys: tuple[str, ...]) -> bool:
    rows = list(rows)
    return bool(rows) and all(all(key in row for key in keys) for row in rows)


def _join_parts(content: Any) -> Any:
    if isinstance(content, list) and content and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        texts = [part.get("text") for part in content]
        return "".join(texts) if all(isinstance(text, str) for text in texts) else content
    return content
