"""ShareGPT: `conversations` with from and value."""

from __future__ import annotations

from tokenize_data.formats.interface import RowFormat, all_have
from tokenize_data.formats.turns import CALL, Turns

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "function_call": CALL,
    "tool_call": CALL,
    "observation": "tool",
    "tool": "tool",
}

_TURNS = Turns(key="conversations", role_key="from", content_key="value", system_key="system", roles=_ROLES)

FORMAT = RowFormat(
    read=_TURNS,
    asked=_TURNS.asked,
    is_like=lambda rows, spec: all_have(rows, "conversations"),
    keys=lambda spec: "conversations, with system and tools where rows have them",
)
