"""Reads files other than JSONL, and yields each row as a JSON line, with texts exactly as in the file."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenize_data.errors import UserError, shorten
from tokenize_data.streams import MAX_LINE_BYTES

_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = "\ufeff"
_STRUCTURE = re.compile(
    r'"[^"\\]*+(?:\\.[^"\\]*+)*+("?)|[\[\]{}]', re.DOTALL
)  # a string, possibly unterminated, or a bracket
_SCALAR = re.compile(r'[^ \t\r\n,\[\]{}"]*+')
_UNREADABLE = (
    ValueError,
    OverflowError,
    TypeError,
    NotImplementedError,
    RecursionError,
)  # errors that Arrow raises for a value, including invalid UTF-8


@dataclass(frozen=True)
class Unreadable:
    """A row that cannot be read, and its part of the file if known."""

    reason: str
    raw: bytes = b""


Row = bytes | Unreadable


def too_long(size: int) -> Unreadable:
    return Unreadable(f"{size:,} bytes long, more than {MAX_LINE_BYTES:,}: split the row, or shorten it")


# ---- JSON: a list of objects, or one object after another


def json_rows(name: str, blocks: Iterator[bytes]) -> Iterator[Row]:
    """Yield each value as written, to be checked later. If it is unclear where the next one begins, the file is in
    error.
    """
    text = _Text(name, blocks)
    if text.next_character() != "[":
        while text.next_character():
            yield text.value()
        return
    text.skip()
    following = text.next_character()
    while following != "]":
        yield text.value()
        following = text.next_character()
        if following not in ("]", ","):
            raise text.error("no ',' or ']' after it")
        if following == ",":
            text.skip()
    text.skip()
    if text.next_character():
        raise text.error("something follows the list's ']'")


class _Text:
    """A buffer of decoded text that has not become a row yet."""

    def __init__(self, name: str, blocks: Iterator[bytes]) -> None:
        self._name, self._blocks = name, blocks
        self._decoder = codecs.getincrementaldecoder("utf-8")(
            "surrogateescape"
        )  # rows are decoded again, and rejected one by one
        self._text, self._at, self._row, self._is_whole = "", 0, 0, False

    def next_character(self) -> str:
        """The next character that is not white space, '' at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._text) or self._is_whole:
                return self._text[self._at : self._at + 1]
            self._read(1)

    def skip(self) -> None:
        self._at += 1

    def value(self) -> bytes:
        """The JSON value that starts here, on one line: line feeds become escapes in strings, and spaces elsewhere."""
        self._row += 1
        if self.next_character() in ("", ",", "]", "}", ":"):
            raise self.error("a value is missing")
        while (end := _end_of_value(self._text, self._at, self._is_whole)) is None:
            left = len(self._text) - self._at
            if self._is_whole or left > MAX_LINE_BYTES:
                raise self.error(
                    "it has no end"
                    if self._is_whole
                    else f"more than {MAX_LINE_BYTES:,} characters long, or without an end"
                )
            self._read(left)
        piece = self._text[self._at : end]
        self._at = end
        return piece.replace("\n", " ").encode("utf-8", "surrogateescape")

    def error(self, reason: str) -> UserError:
        begins = shorten(self._text[self._at : self._at + 60])
        return UserError(
            f"{self._name} cannot be read as JSON: row {self._row}: {reason}, at {begins}: "
            "write a list of objects, or a .jsonl file with one object a line"
        )

    def _read(self, least: int) -> None:
        """Read at least this many more characters, unless the file ends."""
        parts = [self._text[self._at :]]
        while least > 0 and not self._is_whole:
            block = next(self._blocks, None)
            self._is_whole = block is None
            parts.append(self._decoder.decode(block or b"", final=block is None))
            least -= len(parts[-1])
        self._text, self._at = "".join(parts), 0


def _end_of_value(text: str, at: int, is_whole: bool) -> int | None:
    """The end of the value that starts at `at`, None if it is not in the buffer. Nothing is built: a small file may
    hold millions of values.
    """
    if text[at] == '"':
        found = _STRUCTURE.match(text, at)
        return found.end() if found and found[1] else None
    if text[at] not in "[{":
        found = _SCALAR.match(text, at)
        assert found is not None
        return found.end() if is_whole or found.end() < len(text) else None
    depth = 0
    for found in _STRUCTURE.finditer(text, at):
        character = text[found.start()]
        if character == '"':
            continue
        depth += 1 if character in "[{" else -1
        if depth == 0:
            return found.end()
    return None


# ---- CSV and TSV


def csv_rows(name: str, blocks: Iterator[bytes], delimiter: str) -> Iterator[Row]:
    """Yield rows under the header's names. All values are strings; empty ones are empty strings."""
    csv.field_size_limit(2 * MAX_LINE_BYTES)  # of the whole process, and never the limit here: `_Lines` stops sooner
    lines = _Lines(name, blocks)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        try:
            record = next(reader, None)
            raw, _ = lines.taken()
        except csv.Error as error:
            raw, count = lines.taken()
            if lines.is_end and count > 1:
                raise UserError(
                    f"{name} row {lines.rows + 1}: a quote is opened and never closed: close it, or double it"
                ) from error
            record = [str(error)]
            row: Row = Unreadable(
                f"not valid CSV: {error}: put quotes around the whole value, and double those within it", raw
            )
        else:
            if record is None:
                return
            if not record:
                continue
            row = _csv_row(header, record, raw)
        if header is None:
            header = _header(name, row, record)
            continue
        lines.rows += 1
        yield row


def _csv_row(header: list[str] | None, record: list[str], raw: bytes) -> Row:
    if record[0].startswith(_BOM):
        return Unreadable(
            "a byte-order mark in the middle of the file, as where two were joined: remove it, and a second header", raw
        )
    if header is None:
        return b""
    if len(record) != len(header):
        return Unreadable(
            f"{len(record)} values, the header names {len(header)}: put quotes around values with separators", raw
        )
    return json.dumps(dict(zip(header, record, strict=True)), ensure_ascii=False).encode("utf-8", "surrogateescape")


def _header(name: str, row: Row, record: list[str]) -> list[str]:
    if isinstance(row, Unreadable):
        raise UserError(f"{name}: the header is {row.reason}")
    twice = sorted({column for column in record if record.count(column) > 1})
    if twice:
        raise UserError(f"{name}: the header names {shorten(twice[0])} twice: give each column a name of its own")
    return record


class _Lines:
    """Gives the csv module the file's lines with their ends, and records which ones it used for a row."""

    def __init__(self, name: str, blocks: Iterator[bytes]) -> None:
        self._name, self._lines = name, _physical_lines(blocks)
        self._taken, self._count = bytearray(), 0
        self.rows, self.is_end = 0, False

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines, None)
        if line is None:
            self.is_end = True
            raise StopIteration
        self._taken += line
        self._count += 1
        if len(self._taken) > MAX_LINE_BYTES:
            raise UserError(
                f"{self._name} row {self.rows + 1}: more than {MAX_LINE_BYTES:,} bytes long: close its quotes, "
                "or shorten the row"
            )
        return line.decode("utf-8", "surrogateescape")

    def taken(self) -> tuple[bytes, int]:
        """The lines used since the last call, and their number."""
        raw, count = bytes(self._taken).rstrip(b"\r\n"), self._count
        self._taken, self._count = bytearray(), 0
        return raw, count


def _physical_lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from (line + b"\n" for line in lines)
        if len(rest) > MAX_LINE_BYTES:
            yield rest
            rest = b""
    if rest:
        yield rest


# ---- Arrow and Parquet


def arrow_rows(batches: Iterator[Any]) -> Iterator[Row]:
    """Yield rows of record batches. Values that are neither strings nor numbers become objects with their type."""
    for batch in batches:
        rows: list[Row]
        try:
            rows = [_as_line(row) for row in batch.to_pylist()]
        except _UNREADABLE:
            rows = [_one_row(batch.slice(number, 1)) for number in range(len(batch))]
        yield from rows


def _one_row(batch: Any) -> Row:
    try:
        return _as_line(batch.to_pylist()[0])
    except _UNREADABLE as error:
        return Unreadable(f"cannot be read from its columns ({shorten(error)}): write the row again")


def _as_line(row: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_typed)
    except ValueError:  # NaN or infinity in a column
        text = json.dumps(_without_nan(row), ensure_ascii=False, default=_typed)
    return text.encode("utf-8", "surrogatepass")


def _typed(value: Any) -> dict[str, str]:
    return {type(value).__name__: f"{len(value)} bytes" if isinstance(value, bytes) else str(value)}


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
        return _typed(value)
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value
