"""What a model thinks before it answers, in rows and in the texts of templates."""

from __future__ import annotations

import re
from typing import Any

_INLINE = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)
_EMPTY = re.compile(r"\s*<think>\s*</think>\s*")
_CLOSED = re.compile(r"\s*</think>\s*")
_OPENING, _CLOSING = "<think>", "\n</think>\n\n"
_IN_TEMPLATES = ("<think>", "reasoning_content", "message.thinking")


def thoughts_of(message: dict[str, Any]) -> str | None:
    """A message's thoughts: a field of their own, or before its content in <think> tags."""
    if (given := message.get("reasoning_content")) is not None:
        return str(given)
    found = _INLINE.match(message["content"])
    return found.group(1) if found and found.group(1).strip() else None


def without(content: str) -> str:
    """A content without the thoughts in it."""
    return _INLINE.sub("", content, count=1) if _INLINE.match(content) else content


def inline(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its thoughts in its content, for templates that look for them there."""
    kept = {key: value for key, value in message.items() if key not in ("reasoning_content", "thinking")}
    thoughts = str(message["reasoning_content"]).strip("\n")
    return {**kept, "content": f"{_OPENING}\n{thoughts}{_CLOSING}{message['content']}"}


def length_of_empty(prompt: str, text: str) -> int:
    """How much of the beginning of `text`, behind `prompt`, is a template's note that nothing was thought."""
    found = (_CLOSED if prompt.rstrip().endswith(_OPENING) else _EMPTY).match(text)
    return found.end() if found else 0


def has_place(template: str) -> bool:
    """Whether a template's source knows of thoughts at all."""
    return any(name in template for name in _IN_TEMPLATES)


def continued(prompt: str, answered: str, thoughts: str | None) -> tuple[str, int] | None:
    """(text, where the model begins to write) for templates whose prompt opens the thoughts, which they leave out of
    the conversation that is answered. None where the two differ in another way.
    """
    stripped = prompt.rstrip()
    if stripped.endswith(_OPENING) and answered.startswith(stripped) and not answered.startswith(prompt):
        text = prompt + answered[len(stripped) :].lstrip(
            "\n"
        )  # <think></think> where the prompt has <think> and a newline
        return text, len(prompt) + (length_of_empty(prompt, text[len(prompt) :]) if thoughts is None else 0)
    shorter = min(len(prompt), len(answered))
    common = next((at for at in range(shorter) if prompt[at] != answered[at]), shorter)
    if prompt[common:].strip() != _OPENING:
        return None
    body = answered[common:].lstrip("\n")
    if thoughts is None:
        return prompt + _CLOSING + body, len(prompt) + len(_CLOSING)
    return prompt + thoughts.strip("\n") + _CLOSING + body, len(prompt)
