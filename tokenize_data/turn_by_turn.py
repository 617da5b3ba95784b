"""Conversations with tools or thoughts: each trained turn is found by rendering the conversation up to it.

What the model has to write in a turn begins where the generation prompt ends, and ends with the end of turn.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Protocol

from tokenize_data import thoughts
from tokenize_data.errors import RowError, shorten
from tokenize_data.rendered import Message, Rendered, Tools, with_turns


class Template(Protocol):
    name: str
    source: str
    closing: str

    def render(self, messages: Sequence[Message], generation_prompt: bool = False, tools: Tools = None) -> str: ...

    def end_of_written(self, text: str, start: int) -> int | None: ...

    def special_at(self, text: str, start: int) -> str: ...


def is_needed(messages: Sequence[Message], tools: Tools) -> bool:
    """Whether the template's text depends on the contents."""
    return tools is not None or any(
        message["role"] == "tool" or "tool_calls" in message or thoughts.thoughts_of(message) is not None
        for message in messages
    )


def documents(template: Template, messages: Sequence[Message], tools: Tools) -> list[Rendered]:
    """The documents of a conversation: several if the template renders a turn differently once it is history."""
    messages = [_with_place_for_thoughts(template, message, number) for number, message in enumerate(messages, 1)]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight", 1)]
    if not turns:
        raise RowError("every assistant message has weight 0, so there is nothing to learn: leave the row out")
    whole = template.render(messages, tools=tools)
    _check_tools(template, whole, tools)
    written = {turn: _written(template, messages, tools, turn) for turn in turns}
    last, *_ = written.get(len(messages) - 1, (whole,))
    if last.startswith(whole.rstrip()):
        whole = last  # including the token at which the model stops
    together: dict[int, tuple[int, int]] = {}
    made = []
    for turn, (text, start, end) in written.items():
        if whole.startswith(text[:end]):
            together[turn] = (start, end)
        else:
            made.append(with_turns(text, messages[: turn + 1], {turn: (start, end)}))
    return [*made, with_turns(whole, messages, together)] if together else made


def _written(template: Template, messages: Sequence[Message], tools: Tools, turn: int) -> tuple[str, int, int]:
    """Returns (the conversation up to this turn, where the model starts to write, where the turn ends)."""
    message = messages[turn]
    thought = thoughts.thoughts_of(message)
    prompt = template.render(messages[:turn], True, tools)
    text = template.render(messages[: turn + 1], tools=tools)
    start = len(prompt)
    if not text.startswith(prompt):
        made = thoughts.continued(prompt, text, thought)
        if made is None:
            raise RowError(
                f"template '{template.name}' asks for message {turn + 1} with {shorten(prompt[-58:], 80)} but does not "
                f"write it after that ({shorten(text[-58:], 80)}): the model would be trained on what it is never "
                "asked for; use another --template"
            )
        text, start = made
    if thought is None:
        start += thoughts.length_of_empty(text[:start], text[start:])
    _check_turn(template, message, turn, thought, text[start:])
    end = template.end_of_written(text, start)
    if end is None:
        text = text.rstrip()
        text += (
            _stop_of_call(template, messages[: turn + 1], text, tools) if "tool_calls" in message else template.closing
        )
        end = len(text)
    return text, start, end


def _stop_of_call(template: Template, messages: Sequence[Message], text: str, tools: Tools) -> str:
    """The token at which the model stops after a call, if the template leaves it to the tool's result."""
    with contextlib.suppress(RowError):
        followed = template.render([*messages, {"role": "tool", "content": "?"}], tools=tools)
        return template.special_at(followed, len(text)) if followed.startswith(text) else ""
    return ""


def _with_place_for_thoughts(template: Template, message: Message, number: int) -> Message:
    """Move thoughts into the content, for templates without a field for them."""
    if "reasoning_content" not in message or "reasoning_content" in template.source or ".thinking" in template.source:
        return message
    if not thoughts.has_place(template.source):
        raise RowError(
            f"message {number} has thoughts (reasoning_content), which template '{template.name}' has no place for: "
            "choose another --template, or write them into its content"
        )
    return thoughts.inline(message)


def _check_turn(template: Template, message: Message, turn: int, thought: str | None, written: str) -> None:
    """Raise RowError if the template omits part of a turn, which would then not be trained."""
    parts = {"content": thoughts.without(message["content"]), "thoughts": thought or ""}
    lost = [what for what, part in parts.items() if part.strip() and part.strip() not in written]
    lost += [
        f"the call of '{name}'"
        for call in message.get("tool_calls") or []
        if (name := call["function"]["name"]) not in written
    ]
    if lost:
        raise RowError(
            f"template '{template.name}' leaves out {' and '.join(lost)} of message {turn + 1}, or rewrites it: change "
            "the row, or use another --template"
        )


def _check_tools(template: Template, whole: str, tools: Tools) -> None:
    names = [tool.get("function", tool).get("name") for tool in tools or [] if isinstance(tool, dict)]
    lost = [name for name in names if isinstance(name, str) and not re.search(re.escape(name), whole)]
    if lost:
        raise RowError(
            f"template '{template.name}' shows the model no tools ({shorten(', '.join(lost))}): choose a --template "
            "that does, or leave out 'tools'"
        )
