"""Chat: `messages` with role and content."""

from __future__ import annotations

from tokenize_data.formats.interface import RowFormat, all_have
from tokenize_data.formats.turns import Turns

_ROLES = ("system", "developer", "user", "assistant")

FORMAT = RowFormat(
    messages=Turns(key="messages", role_key="role", content_key="content", roles={role: role for role in _ROLES}),
    is_like=lambda rows, spec: all_have(rows, "messages"),
    keys=lambda spec: "messages",
)
