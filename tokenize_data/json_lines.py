"""Parses lines of JSONL. Errors name the value and the remedy."""

from __future__ import annotations

import json
import re
from typing import Any

from tokenize_data.errors import RowError, shorten

Row = dict[str, Any]


def _refuse_constant(name: str) -> Any:
    raise RowError(f"has the value {name}, which is not JSON: write null or a text, or leave the row out")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


_JSON_TEXT = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


_LARGE, _MOST_VALUES = 1 << 20, 500_000  # 16 MB of small values would take half a GB of memory


def _num_values(text: str) -> int:
    """Roughly the number of values in a row."""
    structure = _JSON_TEXT.sub("", text)
    return sum(map(structure.count, ",[{"))


def parse_line(line: bytes) -> Row:
    """Parse a line of JSONL."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise RowError(
            f"not UTF-8: byte 0x{line[error.start]:02x} at {error.start + 1}: save the file as UTF-8"
        ) from error
    if "\x00" in text:
        raise RowError(
            f"a NUL byte at {text.index(chr(0)) + 1}: the file is damaged there, or is not text; write the row again"
        )
    if len(text) > _LARGE and _num_values(text) > _MOST_VALUES:
        raise RowError(f"more than {_MOST_VALUES:,} values: a row is one flat object")
    try:
        row = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            rest = text[error.pos :].lstrip(" ,")
            if rest.startswith("{"):
                raise RowError(
                    f"two objects on one line (the second begins at character {error.pos + 1}): one object a line"
                ) from error
        raise RowError(
            f"not valid JSON: {error.msg} at character {error.pos + 1} of {shorten(text.strip())}: fix the line"
        ) from error
    except RecursionError as error:
        raise RowError("JSON nested too deeply: a row is one flat object") from error
    except ValueError as error:  # an integer of more than 4,300 digits
        raise RowError(f"not valid JSON: {shorten(error, 100)}") from error
    if not isinstance(row, dict):
        raise RowError(f"{kind_of(row)} ({shorten(row)}), not an object: a line is {{...}} with keys and values")
    return row


def kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    kinds = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)
