"""Question and answer, by the keys or templates that the user names."""

from __future__ import annotations

from collections.abc import Sequence

from tokenize_data.dataset import DEFAULT_ANSWER_KEY, DEFAULT_QUESTION_KEY, DatasetSpec
from tokenize_data.fields import Fields, Message
from tokenize_data.formats.interface import RowFormat, all_have
from tokenize_data.json_lines import Row


def _messages(row: Row, fields: Fields) -> list[Message]:
    spec = fields.spec
    if spec.prompt is not None:
        question = fields.fill(spec.prompt, row)
    else:
        question = fields.text(row, spec.question_key, "question_key")
    if spec.answer is not None:
        answer = fields.fill(spec.answer, row)
    else:
        answer = fields.text(row, spec.answer_key, "answer_key")
    return [*fields.system(row), {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _is_like(rows: Sequence[Row], spec: DatasetSpec) -> bool:
    is_named = (spec.question_key, spec.answer_key) != (DEFAULT_QUESTION_KEY, DEFAULT_ANSWER_KEY)
    return is_named or spec.prompt is not None or all_have(rows, spec.question_key, spec.answer_key)


def _keys(spec: DatasetSpec) -> str:
    if spec.prompt is not None:
        return f"{spec.prompt!r} -> {spec.answer or spec.answer_key}"
    return f"{spec.question_key} -> {spec.answer_key}"


FORMAT = RowFormat(messages=_messages, is_like=_is_like, keys=_keys)
