"""Question and answer, by the keys or templates that the user names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenize_data import paths
from tokenize_data.dataset import DEFAULT_ANSWER_KEY, DEFAULT_QUESTION_KEY, DatasetSpec
from tokenize_data.fields import Conversation, Fields
from tokenize_data.formats.interface import RowFormat, all_have, as_list
from tokenize_data.json_lines import Row


def _read(row: Row, fields: Fields) -> Conversation:
    spec = fields.spec
    if spec.prompt is not None:
        question = fields.fill(spec.prompt, row)
    else:
        question = fields.text(row, spec.question_key, "question_key")
    if spec.answer is not None:
        answer = fields.fill(spec.answer, row)
    else:
        answer = fields.text(row, spec.answer_key, "answer_key")
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(messages=[*fields.system(row), *turns])


def _is_like(rows: Sequence[Row], spec: DatasetSpec) -> bool:
    is_named = (spec.question_key, spec.answer_key) != (DEFAULT_QUESTION_KEY, DEFAULT_ANSWER_KEY)
    return is_named or spec.prompt is not None or all_have(rows, spec.question_key, spec.answer_key)


def _keys(spec: DatasetSpec) -> str:
    if spec.prompt is not None:
        return f"{spec.prompt!r} -> {spec.answer or spec.answer_key}"
    return f"{spec.question_key} -> {spec.answer_key}"


def _answers(row: Row, spec: DatasetSpec) -> list[Any] | None:
    if spec.answer is not None:
        return None  # the template uses other fields
    return as_list(paths.find(row, spec.answer_key)) if paths.has(row, spec.answer_key) else []


FORMAT = RowFormat(
    read=_read,
    is_like=_is_like,
    keys=_keys,
    with_answer=lambda row, spec, answer: {**row, spec.answer_key: answer},  # a literal key precedes a path
    answers=_answers,
)
