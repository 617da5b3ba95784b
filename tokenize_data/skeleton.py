"""The text that a template writes around the contents of conversations with the same roles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenize_data.rendered import TEMPLATE, Message, Rendered


@dataclass(frozen=True)
class Part:
    """A piece of a skeleton: a literal with its spans, or the position of a message's content (message >= 0)."""

    literal: str = ""
    spans: tuple[tuple[int, int], ...] = ()  # (start within the literal, role)
    split: int | None = None  # positions in the literal where the model starts to write
    message: int = -1
    role: int = TEMPLATE
    strip_left: bool = False
    strip_right: bool = False


@dataclass(frozen=True)
class Skeleton:
    parts: tuple[Part, ...] | None  # None: contents do not each appear once, in order
    suffixes: dict[int, str]  # turn -> literal from its content to the end of turn, inclusive
    num_special: int = 0


def fill(skeleton: Skeleton, messages: Sequence[Message]) -> Rendered | None:
    if skeleton.parts is None:
        return None
    texts: list[str] = []
    starts: list[int] = []
    roles: list[int] = []
    splits: list[int] = []
    length = 0
    for part in skeleton.parts:
        if part.message < 0:
            piece = part.literal
            for start, role in part.spans:
                starts.append(length + start)
                roles.append(role)
            if part.split is not None:
                splits.append(length + part.split)
        else:
            piece = messages[part.message]["content"]
            piece = piece.lstrip() if part.strip_left else piece
            piece = piece.rstrip() if part.strip_right else piece
            starts.append(length)
            roles.append(part.role)
        texts.append(piece)
        length += len(piece)
    return Rendered("".join(texts), starts, roles, splits, skeleton.num_special)
