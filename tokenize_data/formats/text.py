"""Plain text without roles, trained from its second token to EOS."""

from __future__ import annotations

from tokenize_data.fields import Conversation, Fields
from tokenize_data.formats.interface import RowFormat, all_have
from tokenize_data.json_lines import Row


def _read(row: Row, fields: Fields) -> Conversation:
    text = fields.text(row, fields.spec.text_key, "text_key")
    return Conversation(messages=[{"role": "assistant", "content": text}], kind="text")


FORMAT = RowFormat(
    read=_read, is_like=lambda rows, spec: all_have(rows, spec.text_key), keys=lambda spec: spec.text_key
)
