"""Prompt and completion, as TRL has them: two texts, which are joined without a template, or two lists of messages,
which go through it. Only the completion is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenize_data.dataset import DatasetSpec
from tokenize_data.errors import RowError
from tokenize_data.fields import Conversation, Fields
from tokenize_data.formats.interface import RowFormat, all_have, as_list
from tokenize_data.formats.turns import CHAT_ROLES, Turns, tools_of
from tokenize_data.json_lines import Row, kind_of

_PROMPT, _COMPLETION = (
    Turns(key=key, role_key="role", content_key="content", roles=CHAT_ROLES) for key in ("prompt", "completion")
)


def _read(row: Row, fields: Fields) -> Conversation:
    kinds = {key: kind_of(row.get(key)) for key in ("prompt", "completion")}
    if kinds["prompt"] == kinds["completion"] == kind_of([]):
        prompt = [{**message, "weight": 0} for message in _PROMPT.turns(row, fields)]
        messages = [*prompt, *_COMPLETION.turns(row, fields)]
        if not any(message["role"] == "assistant" for message in messages[len(prompt) :]):
            raise RowError("'completion' has no assistant message, so nothing to learn: add one, or leave the row out")
        system = [] if messages[0]["role"] == "system" else fields.system(row)
        return Conversation(messages=[*system, *messages], tools=tools_of(row))
    if all(key in row for key in kinds) and kind_of([]) in kinds.values():
        raise RowError(
            f"'prompt' is {kinds['prompt']} and 'completion' {kinds['completion']}: make both texts, or both lists of "
            "messages"
        )
    prompt_text, completion = fields.text(row, "prompt", may_be_empty=True), fields.text(row, "completion")
    pieces = [{"role": "user", "content": prompt_text}, {"role": "assistant", "content": completion}]
    return Conversation(messages=pieces, kind="text")


def _is_like(rows: Sequence[Row], spec: DatasetSpec) -> bool:
    return all_have(rows, "prompt", "completion")


def _answers(row: Row, spec: DatasetSpec) -> list[Any] | None:
    given = row.get("completion")
    return None if isinstance(given, list) else as_list(given)


FORMAT = RowFormat(
    read=_read,
    is_like=_is_like,
    keys=lambda spec: "prompt -> completion",
    with_answer=lambda row, spec, answer: {
        **row,
        "completion": [{"role": "assistant", "content": answer}] if isinstance(row.get("prompt"), list) else answer,
    },
    answers=_answers,
)
