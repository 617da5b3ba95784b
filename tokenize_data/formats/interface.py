"""What a format of rows is."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenize_data.dataset import DatasetSpec
from tokenize_data.fields import Fields, Message
from tokenize_data.json_lines import Row


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How rows of a data set become conversations."""

    messages: Callable[[Row, Fields], list[Message]]
    is_like: Callable[[Sequence[Row], DatasetSpec], bool]  # whether rows are recognised as of this format
    keys: Callable[[DatasetSpec], str]  # which keys it reads, as shown to the user
    is_plain_text: bool = False  # one text without roles, trained from its second token to the end


def format_of(name: str) -> RowFormat:
    """By its name, so that a new format is one file."""
    found: RowFormat = importlib.import_module(f"tokenize_data.formats.{name}").FORMAT
    return found


def all_have(rows: Sequence[Row], *keys: str) -> bool:
    return bool(rows) and all(key in row for row in rows for key in keys)
