"""Renders a chat template that may be hostile: in a sandbox, with limits on time, memory and output.

In the process that made it, it is compiled and rendered in a child, so that nothing it does reaches this process. In a
worker, which was forked from that process, it is rendered there: a worker may be killed, and then its parent says why.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from tokenize_data import guard
from tokenize_data.errors import RowError, UserError, shorten
from tokenize_data.rendered import Message, Tools

LIMITS = guard.Limits(seconds=5, num_bytes=1 << 30)  # for one conversation, which takes a thousandth of a second
_MOST_WRITTEN, _MOST_TIMES = 1 << 20, 20  # characters besides the conversation's own; how often those may be written


class Renderer:
    """Bound to one template and one tokenizer's special tokens."""

    def __init__(self, name: str, source: str, variables: Mapping[str, str]) -> None:
        self._name = name
        self._source = source
        self._variables = dict(variables)
        self._now = datetime.now()
        self._home: int | None = os.getpid()
        self._child: guard.Child | None = None
        self._fence = guard.Fence(LIMITS)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker elsewhere, which renders by itself, as forked ones do."""
        kept = {name: value for name, value in self.__dict__.items() if name != "_compiled"}
        return {**kept, "_home": None, "_child": None, "_fence": guard.Fence(LIMITS)}

    def __call__(self, messages: Sequence[Message], generation_prompt: bool, tools: Tools = None) -> str:
        """RowError where the template refuses the conversation, UserError where it breaks a limit."""
        try:
            if os.getpid() != self._home:
                return self._fence.call(self._render, (messages, generation_prompt, tools))
            if self._child is None:
                self._child = guard.Child(self._render, LIMITS)
            return self._child.ask((messages, generation_prompt, tools))
        except (guard.LimitError, MemoryError) as error:
            self._child = None
            what = LIMITS.text("memory") if isinstance(error, MemoryError) else str(error)
            raise UserError(
                f"template '{self._name}' {what} on one conversation ({_roles(messages)}): use another --template"
            ) from error

    def _render(self, request: tuple[Sequence[Message], bool, Tools]) -> str:
        messages, generation_prompt, tools = request
        try:
            text: str = self._compiled.render(
                messages=messages, tools=tools, add_generation_prompt=generation_prompt, **self._variables
            )
        except (UserError, MemoryError):
            raise
        except Exception as error:  # whatever an expression of the template can raise
            raise RowError(
                f"template '{self._name}' refuses this conversation ({_roles(messages)}): {shorten(error, 160)}; "
                "change the row, or choose another --template"
            ) from error
        if len(text) > _MOST_WRITTEN and len(text) > _MOST_WRITTEN + _MOST_TIMES * (own := len(str(messages))):
            raise UserError(
                f"template '{self._name}' writes {len(text):,} characters for a conversation of {own:,} "
                f"({_roles(messages)}): "
                "use another --template"
            )
        return text

    @cached_property
    def _compiled(self) -> jinja2.Template:
        """The environment is that of transformers' apply_chat_template; the date is that of this start, for all
        rows.
        """
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_refuse, strftime_now=self._now.strftime)
        try:
            return environment.from_string(self._source)
        except MemoryError:
            raise
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"template '{self._name}' does not compile: line {error.lineno}: {error.message}"
            ) from error
        except Exception as error:  # Python's own compiler has limits of its own
            raise UserError(f"template '{self._name}' does not compile: {shorten(error, 160)}") from error


def _roles(messages: Sequence[Message]) -> str:
    roles = [str(message["role"]) for message in messages]
    return " ".join(roles if len(roles) <= 8 else [*roles[:7], "..."])


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


class _GenerationBlock(jinja2.ext.Extension):  # type: ignore[misc]  # jinja2 is not typed
    """`{% generation %}` marks the assistant's text for other trainers; here it only passes its body on."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 wants a class attribute

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)
