"""Rows to questions for a model and the answers that are expected of it, read exactly as training reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tokenize_data.choose import recognise_format
from tokenize_data.dataset import DatasetSpec
from tokenize_data.errors import RowError, UserError
from tokenize_data.fields import Message
from tokenize_data.json_lines import Row, parse_line
from tokenize_data.records import RowReader
from tokenize_data.rows import Unreadable
from tokenize_data.sources import Source, open_sources

_STAND_IN = "-"  # for an answer that a row need not have


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row. `prompt` is the conversation up to the answer; of plain text it is empty, and `text` is the row's."""

    number: int  # among the data set's rows, from 0
    place: str
    row: Row
    prompt: tuple[Message, ...] = ()
    references: tuple[str, ...] = ()
    text: str | None = None

    @property
    def conversation(self) -> list[Message]:
        """What training would see: the prompt and the first reference."""
        return [*self.prompt, {"role": "assistant", "content": self.references[0]}]

    @property
    def question(self) -> str:
        """The last thing that was said to the model."""
        return str(self.prompt[-1]["content"]) if self.prompt else self.text or ""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """A data set's rows. `description` says which format they were taken for."""

    name: str
    rows: list[Example]
    description: str


def read_examples(spec: DatasetSpec, *, answers_needed: bool, limit: int | None = None) -> Examples:
    """All rows, or the first `limit`. The first one that cannot be used is an error, with its place."""
    if spec.weight != 1.0 or spec.samples is not None:
        spec = replace(spec, weight=1.0, samples=None)  # shares are for training; here every row counts once
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
            raise UserError(
                f"{place}: no answer to compare with: the row has {', '.join(map(repr, example.row))}; see --answer_key"
            )
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
    """The training stage's reader, with answers that may be missing, or several."""

    def __init__(self, spec: DatasetSpec, format_name: str) -> None:
        self._format = format_name
        self._reader = RowReader(spec, format_name)
        self._key = {"qa": spec.answer_key, "alpaca": "output"}.get(format_name)
        self._is_filled = format_name == "qa" and spec.answer is not None  # the answer is a template over other fields
        self._turns = {"chat": ("messages", "role", "content"), "sharegpt": ("conversations", "from", "value")}.get(
            format_name
        )

    def example(self, number: int, place: str, row: Row) -> Example:
        if self._format == "text":
            return Example(number=number, place=place, row=row, text=str(self._reader.messages(row)[0]["content"]))
        if self._turns is not None:
            return self._of_turns(number, place, row, *self._turns)
        assert self._key is not None
        given = row.get(self._key)
        answers = (
            [given]
            if self._is_filled
            else [_STAND_IN]
            if given in (None, [])
            else given
            if isinstance(given, list)
            else [given]
        )
        conversations = [self._reader.messages({**row, self._key: answer}) for answer in answers]
        has_answer = self._is_filled or given not in (None, [])
        references = tuple(str(messages[-1]["content"]) for messages in conversations) if has_answer else ()
        return Example(number=number, place=place, row=row, prompt=tuple(conversations[0][:-1]), references=references)

    def _of_turns(self, number: int, place: str, row: Row, key: str, role: str, content: str) -> Example:
        turns = row.get(key)
        is_question = (
            isinstance(turns, list)
            and bool(turns)
            and isinstance(turns[-1], dict)
            and turns[-1].get(role) in ("user", "human")
        )
        if is_question:
            assert isinstance(turns, list)
            row_with = {**row, key: [*turns, {role: "assistant", content: _STAND_IN}]}
            return Example(number=number, place=place, row=row, prompt=tuple(self._reader.messages(row_with)[:-1]))
        messages = self._reader.messages(row)
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        return Example(
            number=number,
            place=place,
            row=row,
            prompt=tuple(messages[:last]),
            references=(str(messages[last]["content"]),),
        )
