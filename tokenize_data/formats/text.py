"""Plain text without roles."""

from __future__ import annotations

from tokenize_data.fields import Fields, Message
from tokenize_data.formats.interface import RowFormat, all_have
from tokenize_data.json_lines import Row


def _messages(row: Row, fields: Fields) -> list[Message]:
    return [{"role": "assistant", "content": fields.text(row, fields.spec.text_key, "text_key")}]


FORMAT = RowFormat(
    messages=_messages,
    is_like=lambda rows, spec: all_have(rows, spec.text_key),
    keys=lambda spec: spec.text_key,
    is_plain_text=True,
)
