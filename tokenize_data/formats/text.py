"""Plain text without roles, trained from its second token to EOS."""

from __future__ import annotations

from collections.abc import Sequence

from tokenize_data.dataset import DEFAULT_TEXT_KEY, DatasetSpec
from tokenize_data.fields import Conversation, Fields
from tokenize_data.formats.interface import RowFormat, all_have
from tokenize_data.json_lines import Row


def _read(row: Row, fields: Fields) -> Conversation:
    text = fields.text(row, fields.spec.text_key, "text_key")
    return Conversation(messages=[{"role": "assistant", "content": text}], kind="text")


def _is_like(rows: Sequence[Row], spec: DatasetSpec) -> bool:
    return spec.text_key != DEFAULT_TEXT_KEY or all_have(rows, spec.text_key)


FORMAT = RowFormat(read=_read, is_like=_is_like, keys=lambda spec: spec.text_key)
