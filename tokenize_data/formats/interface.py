"""The interface of a row format."""

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
    """Converts rows of a data set to conversations."""

    read: Callable[[Row, Fields], Conversation]
    is_like: Callable[[Sequence[Row], DatasetSpec], bool]  # whether rows have this format
    keys: Callable[[DatasetSpec], str]  # the keys that it reads, for messages
    # For evaluation: a row with another answer, and a row's answers; None if it is the last assistant message.
    with_answer: Callable[[Row, DatasetSpec, str], Row] | None = None
    answers: Callable[[Row, DatasetSpec], list[Any] | None] = lambda row, spec: None
    # A row that ends with a question, with this answer appended.
    asked: Callable[[Row, DatasetSpec, str], Row | None] | None = None


def format_of(name: str) -> RowFormat:
    """Import a format by name, so that a new one is one file."""
    found: RowFormat = importlib.import_module(f"tokenize_data.formats.{name}").FORMAT
    return found


def all_have(rows: Sequence[Row], *keys: str) -> bool:
    return bool(rows) and all(paths.has(row, key) for row in rows for key in keys)


def as_list(value: Any) -> list[Any]:
    """The answers in a row's field: none, one, or several."""
    return [] if value is None else value if isinstance(value, list) else [value]
