"""A rendered document: text with roles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Tools = Sequence[Any] | None

TEMPLATE, SYSTEM, USER, ASSISTANT = range(4)
ROLE_NAMES = ("template", "system", "user", "assistant")
ROLE_OF = {"system": SYSTEM, "developer": SYSTEM, "user": USER, "assistant": ASSISTANT}


@dataclass(frozen=True)
class Rendered:
    """One document as text. `roles[i]` holds from `starts[i]` to `starts[i + 1]`; `splits` are where the model begins
    to write.
    """

    text: str
    starts: list[int]
    roles: list[int]
    splits: list[int]
    num_special: int | None = None  # special tokens that the template itself wrote; None where that is not known


def with_turns(text: str, messages: Sequence[Message], turns: dict[int, tuple[int, int]]) -> Rendered:
    """A rendered conversation whose trained turns, by the number of their message, stand where `turns` says. What the
    user and the system said is looked for between them.
    """
    marks: list[tuple[int, int, int]] = []  # (start, end, role), in order
    cursor = 0
    for index, message in enumerate(messages):
        if index in turns:
            marks.append((*turns[index], ASSISTANT))
            cursor = turns[index][1]
        elif message["role"] != "assistant" and (content := message["content"].strip()):
            limit = min((start for turn, (start, _) in turns.items() if turn > index), default=len(text))
            found = text.find(content, cursor, limit)
            if found >= 0:
                cursor = found + len(content)
                marks.append((found, cursor, ROLE_OF.get(message["role"], USER)))
    starts, roles = [0], [TEMPLATE]
    for start, end, role in marks:
        starts += [start, end]
        roles += [role, TEMPLATE]
    return Rendered(text, starts, roles, [start for start, _, role in marks if role == ASSISTANT])
