"""Alpaca: instruction, input (which may be empty), output."""

from __future__ import annotations

from tokenize_data.fields import Fields, Message
from tokenize_data.formats.interface import RowFormat, all_have
from tokenize_data.json_lines import Row

_PROMPT = "{instruction}\n\n{input}"


def _messages(row: Row, fields: Fields) -> list[Message]:
    instruction = fields.text(row, "instruction")
    has_input = isinstance(row.get("input"), str) and row["input"].strip()
    if fields.spec.prompt is not None:
        question = fields.fill(fields.spec.prompt, row)
    else:
        question = fields.fill(_PROMPT, row) if has_input else instruction
    answer = fields.text(row, "output")
    return [*fields.system(row), {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


FORMAT = RowFormat(
    messages=_messages,
    is_like=lambda rows, spec: all_have(rows, "instruction", "output"),
    keys=lambda spec: "instruction, input -> output",
)
