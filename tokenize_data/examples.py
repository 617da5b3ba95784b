"""Reads rows as questions for a model with expected answers, exactly as training reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tokenize_data.choose import recognise_format
from tokenize_data.dataset import DatasetSpec
from tokenize_data.errors import RowError, UserError
from tokenize_data.fields import Conversation, Kind, Message
from tokenize_data.json_lines import Row, parse_line
from tokenize_data.records import RowReader
from tokenize_data.rows import Unreadable
from tokenize_data.sources import Source, open_sources

_STAND_IN = "-"  # stands for a missing answer


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row. `prompt` is the conversation up to the answer; of plain text it is empty, and `text` is the row's."""

    number: int  # the row's number, from 0
    place: str
    row: Row
    prompt: tuple[Message, ...] = ()
    references: tuple[str, ...] = ()
    text: str | None = None
    kind: Kind = "chat"
    tools: list[Any] | None = None

    def answered(self, answer: str) -> Conversation:
        """The conversation that training would see with this answer."""
        messages = [*self.prompt, {"role": "assistant", "content": answer}]
        return Conversation(messages=messages, kind=self.kind, tools=self.tools)

    @property
    def question(self) -> str:
        """The last message to the model."""
        return str(self.prompt[-1]["content"]) if self.prompt else self.text or ""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """A data set's rows. `description` names the format that they were read as."""

    name: str
    rows: list[Example]
    description: str


def read_examples(spec: DatasetSpec, *, answers_needed: bool, limit: int | None = None) -> Examples:
    """Read all rows or the first `limit`. An invalid row is an error with its line."""
    if spec.weight != 1.0 or spec.samples is not None:
        spec = replace(spec, weight=1.0, samples=None)  # shares are for training; evaluation uses every row once
    sources = open_sources(spec.files)
    name, description = recognise_format(spec, sources)
    reading = _Reading(spec, name)
    rows: list[Example] = []
    for place, line in _lines(sources):
        if limit is not None and len(rows) >= limit:
            break
        try:
            example = reading.example(len(rows), place, parse_line(line))
        except RowError as error:
            raise error.at(place) from error
        if answers_needed and example.text is None and not example.references:
            raise UserError(f"{place}: no answer to compare with: {reading.why_unanswered(example.row)}")
        rows.append(example)
    if not rows:
        raise UserError(f"{', '.join(spec.files)}: no rows: give data with at least one")
    return Examples(name=spec.name, rows=rows, description=description)


def _lines(sources: list[Source]) -> Iterator[tuple[str, bytes]]:
    for source in sources:
        for chunk in source.chunks(0):
            for number, row in chunk.rows():
                if isinstance(row, Unreadable):
                    raise UserError(f"{source.place(number)}: {row.reason}")
                yield source.place(number), row


class _Reading:
    """The data stage's reader, with answers that may be missing or several."""

    def __init__(self, spec: DatasetSpec, format_name: str) -> None:
        self._reader = RowReader(spec, format_name)
        self.why_unanswered = self._reader.why_unanswered

    def example(self, number: int, place: str, row: Row) -> Example:
        answers = self._reader.answers(row)
        if answers is None:
            return self._of_last_turn(number, place, row)
        rows = [self._reader.with_answer(row, answer) for answer in answers or [_STAND_IN]]
        read = [self._reader.conversation(one) for one in rows if one is not None]
        references = tuple(str(one.messages[-1]["content"]) for one in read) if answers else ()
        return _example(number, place, row, read[0], len(read[0].messages) - 1, references)

    def _of_last_turn(self, number: int, place: str, row: Row) -> Example:
        asked = self._reader.asked(row, _STAND_IN)
        if asked is not None:
            return _example(number, place, row, asked, len(asked.messages) - 1, ())
        read = self._reader.conversation(row)
        if len(read.messages) == 1 and read.kind == "text":
            return Example(number=number, place=place, row=row, text=str(read.messages[0]["content"]))
        last = max(index for index, message in enumerate(read.messages) if message["role"] == "assistant")
        return _example(number, place, row, read, last, (str(read.messages[last]["content"]),))


def _example(number: int, place: str, row: Row, read: Conversation, last: int, references: tuple[str, ...]) -> Example:
    prompt = tuple(read.messages[:last])
    return Example(
        number=number, place=place, row=row, prompt=prompt, references=references, kind=read.kind, tools=read.tools
    )
