"""Chat: `messages` with role and content."""

from __future__ import annotations

from tokenize_data.formats.interface import RowFormat, all_have
from tokenize_data.formats.turns import CHAT_ROLES, Turns

_TURNS = Turns(key="messages", role_key="role", content_key="content", roles=CHAT_ROLES)

FORMAT = RowFormat(
    read=_TURNS, asked=_TURNS.asked, is_like=lambda rows, spec: all_have(rows, "messages"), keys=lambda spec: "messages"
)
