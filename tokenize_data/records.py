"""Rows to conversations, by the format of their data set."""

from __future__ import annotations

from collections.abc import Sequence

from tokenize_data.dataset import FORMATS, DatasetSpec
from tokenize_data.fields import Fields, Message
from tokenize_data.formats.interface import format_of
from tokenize_data.json_lines import Row


class RowReader:
    """Rows of one data set to messages."""

    def __init__(self, spec: DatasetSpec, format_name: str) -> None:
        self._fields, self._format = Fields(spec), format_of(format_name)
        self.is_plain_text = self._format.is_plain_text

    def messages(self, row: Row) -> list[Message]:
        """The conversation of a row; for plain text one message of the role `assistant`, as all of it is trained."""
        return self._format.messages(row, self._fields)


def recognise(rows: Sequence[Row], spec: DatasetSpec) -> str:
    """The format of a data set, from its first rows, unless the user gave it."""
    if spec.format is not None:
        return spec.format
    return next((name for name in FORMATS if format_of(name).is_like(rows, spec)), FORMATS[0])
