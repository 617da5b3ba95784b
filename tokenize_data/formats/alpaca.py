"""Alpaca: instruction, input (which may be empty), output."""

from __future__ import annotations

from tokenize_data.fields import Conversation, Fields
from tokenize_data.formats.interface import RowFormat, all_have, as_list
from tokenize_data.json_lines import Row

_PROMPT = "{instruction}\n\n{input}"


def _read(row: Row, fields: Fields) -> Conversation:
    instruction = fields.text(row, "instruction")
    has_input = isinstance(row.get("input"), str) and row["input"].strip()
    if fields.spec.prompt is not None:
        question = fields.fill(fields.spec.prompt, row)
    else:
        question = fields.fill(_PROMPT, row) if has_input else instruction
    answer = fields.text(row, "output")
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(messages=[*fields.system(row), *turns])


FORMAT = RowFormat(
    read=_read,
    is_like=lambda rows, spec: all_have(rows, "instruction", "output"),
    keys=lambda spec: "instruction, input -> output",
    with_answer=lambda row, spec, answer: {**row, "output": answer},
    answers=lambda row, spec: as_list(row.get("output")),
)
