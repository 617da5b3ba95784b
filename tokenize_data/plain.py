"""Conversations without a template: concatenated texts."""

from __future__ import annotations

from tokenize_data.fields import Conversation
from tokenize_data.rendered import ASSISTANT, SYSTEM, TEMPLATE, USER, Rendered

_ROLES = {"assistant": ASSISTANT, "system": SYSTEM}


def without_template(conversation: Conversation, bos: str, eos: str) -> Rendered:
    """Join texts. `text` gets BOS and EOS unless it has them; `segments` are tokenised one by one, as in axolotl."""
    is_text = conversation.kind == "text"
    text = bos if is_text and not (bos and conversation.messages[0]["content"].startswith(bos)) else ""
    starts, roles, splits = ([0], [TEMPLATE], []) if text else ([], [], [])
    for piece in conversation.messages:
        role = _ROLES.get(piece["role"], USER)
        if text and (role == ASSISTANT or not is_text):
            splits.append(len(text))
        starts.append(len(text))
        roles.append(role)
        text += piece["content"]
    return Rendered(text if not is_text or (eos and text.endswith(eos)) else text + eos, starts, roles, splits)
