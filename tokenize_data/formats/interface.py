"""What a format of rows is."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenize_data import paths
from tokenize_data.dataset import DatasetSpec
from tokenize_data.fields import Conversation, Fields
from tokenize_data.json_lines import Row


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How rows of a data set become conversations."""

    read: Callable[[Row, Fields], Conversation]
    is_like: Callable[[Sequence[Row], DatasetSpec], bool]  # whether rows are recognised as of this format
    keys: Callable[[DatasetSpec], str]  # which keys it reads, as shown to the user
    # For evaluation: a row with another answer, and the answers of a row, None where its last assistant message is it.
    with_answer: Callable[[Row, DatasetSpec, str], Row] | None = None
    answers: Callable[[Row, DatasetSpec], list[Any] | None] = lambda row, spec: None
    asked: Callable[[Row, str], Row | None] | None = None  # a row that ends with a question, with this answer behind it


def format_of(name: str) -> RowFormat:
    """By its name, so that a new format is one file."""
    found: RowFormat = importlib.import_module(f"tokenize_data.formats.{name}").FORMAT
    return found


def all_have(rows: Sequence[Row], *keys: str) -> bool:
    return bool(rows) and all(paths.has(row, key) for row in rows for key in keys)


def as_list(value: Any) -> list[Any]:
    """The answers of a row in one of its fields: none, one, or several."""
    return [] if value is None else value if isinstance(value, list) else [value]
