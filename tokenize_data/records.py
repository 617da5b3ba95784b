"""Converts rows to conversations, by the format of their data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tokenize_data import paths
from tokenize_data.dataset import FORMATS, RIGHT, SIDES, DatasetSpec
from tokenize_data.errors import RowError, shorten
from tokenize_data.fields import Conversation, Fields, Message
from tokenize_data.formats.interface import format_of
from tokenize_data.json_lines import Row

_MOST_COPIES = 1000


class RowReader:
    """Reads the rows of one data set as conversations."""

    def __init__(self, spec: DatasetSpec, format_name: str) -> None:
        self._spec, self._fields, self._format = spec, Fields(spec), format_of(format_name)

    @property
    def truncation(self) -> tuple[str, str]:
        """Returns (how long documents are truncated, the side of a question that is shortened)."""
        return self._spec.truncate or RIGHT, self._spec.truncate_side or SIDES[0]

    def conversation(self, row: Row) -> Conversation:
        """The whole conversation of a row. Untrained assistant messages have weight 0."""
        read = self._format.read(row, self._fields)
        return read if self._spec.train_on == "all" or read.kind != "chat" else _choose(read, self._spec.train_on)

    def share(self, row: Row) -> float:
        """The row's own weight, if the data set has a key for it."""
        key = self._spec.weight_key
        if key is None:
            return 1.0
        value = paths.find(row, key, "weight_key")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _MOST_COPIES:
            raise RowError(
                f"'{key}' is {shorten(value)}, not a weight: write a number from 0 to {_MOST_COPIES}, or leave out "
                "--weight_key"
            )
        return float(value)

    def answers(self, row: Row) -> list[Any] | None:
        """The reference answers for evaluation; None if it is the last assistant message."""
        return self._format.answers(row, self._spec)

    def why_unanswered(self, row: Row) -> str:
        """Why a row without an answer cannot be trained."""
        try:
            self.conversation(row)
        except RowError as error:
            return str(error)
        return f"the row has {', '.join(map(repr, row))}; see --answer_key"

    def asked(self, row: Row, stand_in: str) -> Conversation | None:
        """A row that ends with a question, with `stand_in` as its answer; None for other rows."""
        ask = self._format.asked
        question = ask(row, self._spec, stand_in) if ask is not None else None
        return self._format.read(question, self._fields) if question is not None else None

    def with_answer(self, row: Row, answer: Any) -> Row | None:
        """The row with another answer; None if the format has no field for it."""
        return self._format.with_answer(row, self._spec, answer) if self._format.with_answer is not None else None


def recognise(rows: Sequence[Row], spec: DatasetSpec) -> str:
    """Detect the format of a data set from its first rows, unless it is given."""
    if spec.format is not None or spec.columns is not None:
        return spec.format or "columns"
    return next((name for name in FORMATS if format_of(name).is_like(rows, spec)), FORMATS[0])


def _choose(read: Conversation, train_on: str) -> Conversation:
    """Train only the chosen turns: the last one, or those of assistants with these names."""
    turns = [index for index, message in enumerate(read.messages) if message["role"] == "assistant"]
    if train_on == "last":
        chosen = set(turns[-1:])
    else:
        names = {name.strip() for name in train_on.split(",")}
        chosen = {index for index in turns if read.messages[index].get("name", "assistant") in names}
        if not chosen:
            found = sorted({str(read.messages[index].get("name", "assistant")) for index in turns})
            raise RowError(
                f"no assistant message has a name of --train_on {train_on}, but {shorten(', '.join(found))}: name one, "
                "or leave the row out"
            )

    def weighed(index: int, message: Message) -> Message:
        return {**message, "weight": 0} if index in turns and index not in chosen else message

    return replace(read, messages=[weighed(index, message) for index, message in enumerate(read.messages)])
