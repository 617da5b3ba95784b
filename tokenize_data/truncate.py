"""Documents that are too long, made to fit: what the user and the system said is shortened, an answer never is.

The document is that of the conversation with the shortened text, rendered and tokenised again: nothing is cut within
the tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from tokenize_data.encode import Encoded
from tokenize_data.errors import RowError
from tokenize_data.fields import Conversation, Message
from tokenize_data.rendered import ROLE_OF, SYSTEM, USER, Rendered

Document = tuple[Rendered, Encoded]
_SLACK = 256  # the search stops this close to --seq: one token in so many
_LAST_WORD = re.compile(r"(?<=\s)\S{1,24}\Z")
Make = Callable[[Conversation], Document]  # makes the same document from another conversation


def refuse_long(length: int, seq: int) -> None:
    """Reject long documents, for --truncate refuse."""
    if length > seq:
        raise RowError(
            f"{length:,} tokens, more than --seq {seq:,} (--truncate refuse): raise --seq, shorten the row, or use "
            "--truncate question"
        )


def shortened(conversation: Conversation, length: int, make: Make, seq: int, side: str) -> Document:
    """The document of a conversation whose longest text is shortened until it has at most `seq` tokens. Where that text
    becomes as short as the next longest, both are shortened.

    `length` is that of the whole document. How many characters may stay is searched between none and all: tokens grow
    nearly evenly with characters, so the next try is where a line between the two ends reaches `seq`.
    """
    longest = max((len(text["content"]) for text in conversation.messages if _may_be_shortened(text)), default=0)
    if conversation.kind == "segments" or not longest:
        raise RowError(
            f"{length:,} tokens, more than --seq {seq:,}, and there is no question to shorten (--truncate question): "
            "raise --seq, or use --truncate right for this data set"
        )
    fits, document = 1, make(_limited(conversation, 1, side))
    tokens_fit = len(document[1].ids)
    if tokens_fit > seq:
        raise RowError(
            f"{length:,} tokens, and without the question still {tokens_fit:,}, more than --seq {seq:,} (--truncate "
            "question): raise --seq, or shorten the answer"
        )
    too_long, tokens_too_long, tries = longest, length, 0
    while too_long - fits > 1 and seq - tokens_fit > seq // _SLACK:
        step = (too_long - fits) * (seq - tokens_fit) // (tokens_too_long - tokens_fit)
        if tries % 3 == 2:  # interpolation failed, or a word is longer than the rest
            step = (too_long - fits) // 2
        limit = fits + min(max(step, 1), too_long - fits - 1)
        tried = make(_limited(conversation, limit, side))
        tokens = len(tried[1].ids)
        if tokens <= seq:
            fits, tokens_fit, document = limit, tokens, tried
        else:
            too_long, tokens_too_long = limit, tokens
        tries += 1
    return document


def _may_be_shortened(message: Message) -> bool:
    return ROLE_OF.get(message["role"]) in (USER, SYSTEM)


def _limited(conversation: Conversation, limit: int, side: str) -> Conversation:
    messages = [
        {**message, "content": limited(message["content"], limit, side)} if _may_be_shortened(message) else message
        for message in conversation.messages
    ]
    return replace(conversation, messages=messages)


def limited(text: str, limit: int, side: str) -> str:
    """Cut a text to at most `limit` characters, between words if possible, and never to blank."""
    if len(text) <= limit:
        return text
    if side == "start":
        return limited(text[::-1], limit, "end")[::-1]
    kept = text[: max(limit, len(text) - len(text.lstrip()) + 1)]
    if len(kept) >= len(text):
        return text
    if not text[len(kept)].isspace():
        words = _LAST_WORD.sub("", kept)
        kept = words if words.strip() else kept
    return kept.rstrip()
