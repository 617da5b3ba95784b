"""Chat templates: a conversation becomes text, and each stretch of the text has a role.

The text is what the template itself renders, always. The spans come from a skeleton: the same conversation with a
placeholder for each content, rendered once for each sequence of roles. What the model has to write in a turn is defined
by generation: it begins where the template's own generation prompt ends, and ends with the end-of-turn token. Where a
skeleton filled with the contents is not the rendered text (the template looks into contents), spans are found by
rendering prefixes of that very conversation.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenize_data import thoughts, turn_by_turn
from tokenize_data.errors import RowError, UserError, shorten
from tokenize_data.rendered import ASSISTANT, ROLE_OF, TEMPLATE, USER, Message, Rendered, Tools, with_turns
from tokenize_data.rendering import Renderer
from tokenize_data.skeleton import Part, Skeleton, fill

_MOST_KEPT = 4096
_PLACEHOLDER = re.compile("(\\s*)\ue000(\\d+)\ue001(\\s*)")


@dataclass
class ChatTemplate:
    """A compiled chat template with one tokenizer's special tokens."""

    name: str
    source: str
    special_tokens: dict[str, str]
    special_texts: frozenset[str]
    _renderer: Renderer = field(init=False, repr=False)
    closing: str = field(init=False, default="", repr=False)  # what follows a turn without its own end
    _opens_thoughts: bool = field(init=False, default=False, repr=False)  # in the generation prompt
    _skeletons: dict[tuple[Any, ...], Skeleton] = field(init=False, default_factory=dict, repr=False)
    _plans: dict[tuple[Any, ...], list[tuple[int, frozenset[int]]]] = field(
        init=False, default_factory=dict, repr=False
    )

    def __post_init__(self) -> None:
        self._renderer = Renderer(self.name, self.source, self.special_tokens)
        alternatives = "|".join(re.escape(text) for text in sorted(self.special_texts, key=len, reverse=True))
        self._special = re.compile(alternatives or r"(?!)")

    def fingerprint(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    def render(self, messages: Sequence[Message], generation_prompt: bool = False, tools: Tools = None) -> str:
        """Render the text that transformers' apply_chat_template returns."""
        return self._renderer(messages, generation_prompt, tools)

    def end_of_written(self, text: str, start: int) -> int | None:
        """Where a turn that begins at `start` ends, in a text that ends with it: behind the special tokens at its end.
        Those after white space are not the turn's: a model that has written the first ones has stopped.
        """
        found = [(match.start(), match.end()) for match in self._special.finditer(text, start)]
        if not found or text[found[-1][1] :].strip():
            return None
        end = found[-1][1]
        for (_, before), (after, _) in reversed(list(itertools.pairwise(found))):
            if text[before:after].strip():
                break
            end = before if before < after else end
        return end

    def special_at(self, text: str, start: int) -> str:
        """The special token at `start`, or an empty string."""
        found = self._special.match(text, start)
        return found.group() if found else ""

    def documents(self, messages: Sequence[Message], tools: Tools = None) -> list[Rendered]:
        """The documents of a conversation: several if the template renders a turn differently once it is history."""
        if self._opens_thoughts or turn_by_turn.is_needed(messages, tools):
            return turn_by_turn.documents(self, messages, tools)
        key = _key(messages)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MOST_KEPT:  # rows whose messages have further keys, such as a time
                self._plans.clear()
                self._skeletons.clear()
            plan = self._plans[key] = self._plan(messages, key)
        return [self._document(messages[:count], trained) for count, trained in plan]

    def end_of_turn(self) -> str | None:
        """The token that ends the assistant's turn, None if the template has none."""
        suffix = self._skeleton(_key(_PROBE), frozenset([1])).suffixes[1]
        found = self._special.findall(suffix)
        return found[-1] if found else None

    def check(self) -> None:
        """Raise UserError for a template that cannot be used for training, before any row is read."""
        try:
            text = self.render(_hollow(_key(_PROBE)))
        except RowError as error:
            raise UserError(f"{error} (tried with one question and one answer)") from error
        found = [int(index) for _, index, _ in _PLACEHOLDER.findall(text)]
        for index, what in ((0, "question"), (1, "answer")):
            if index not in found:
                raise UserError(
                    f"template '{self.name}' drops the {what}: its output for a question and an answer is "
                    f"{_readable(text)}"
                )
        hollow = _hollow(_key(_PROBE))
        if not self._special.search(text, text.index("\ue0001\ue001")):
            with contextlib.suppress(RowError):  # the model stops where the next question would start
                followed = self.render(_hollow(_key([*_PROBE, _PROBE[0]])))
                self.closing = (
                    self.special_at(followed, len(text.rstrip())) if followed.startswith(text.rstrip()) else ""
                )
        opened = thoughts.continued(self.render(hollow[:1], True), text, None)
        self._opens_thoughts = opened is not None
        if not self._opens_thoughts:
            self._plan(_PROBE, _key(_PROBE))

    # ---- plans: which documents a sequence of roles gives

    def _plan(self, messages: Sequence[Message], key: tuple[Any, ...]) -> list[tuple[int, frozenset[int]]]:
        turns = [i for i, (role, trained, _) in enumerate(key) if role == "assistant" and trained]
        if not turns:
            raise RowError("every assistant message has weight 0, so there is nothing to learn: leave the row out")
        hollow = _hollow(key)
        whole = self.render(hollow)
        together, alone = set(), []
        for turn in turns:
            prompt = self.render(hollow[:turn], True)
            as_last = self.render(hollow[: turn + 1])
            if not as_last.startswith(prompt):
                raise RowError(
                    f"template '{self.name}' asks for an answer with {_readable(prompt)} but does not write the "
                    "answer after it "
                    f"({_readable(as_last)}): the model would be trained on what it is never asked for; use another "
                    "--template"
                )
            end = self._end_of_turn_at(as_last, turn)
            (together.add(turn) if whole.startswith(as_last[:end]) else alone.append(turn))
        plan = [(turn + 1, frozenset([turn])) for turn in alone]
        return [*plan, (len(messages), frozenset(together))] if together else plan

    def _end_of_turn_at(self, text: str, turn: int) -> int:
        content = re.search(f"\ue000{turn}\ue001", text)
        if content is None:
            raise RowError(f"template '{self.name}' drops the content of message {turn + 1}: use another --template")
        return self.end_of_written(text, content.end()) or content.end()

    # ---- one document

    def _document(self, messages: Sequence[Message], trained: frozenset[int]) -> Rendered:
        text = self._closed(messages, len(messages) - 1 in trained)
        skeleton = self._skeleton(_key(messages), trained)
        filled = fill(skeleton, messages)
        if filled is not None and filled.text == text:
            return filled
        return self._by_prefixes(text, messages, trained, skeleton.suffixes)

    def _skeleton(self, key: tuple[Any, ...], trained: frozenset[int]) -> Skeleton:
        found = self._skeletons.get((key, trained))
        if found is None:
            found = self._skeletons[(key, trained)] = self._build_skeleton(key, trained)
        return found

    def _build_skeleton(self, key: tuple[Any, ...], trained: frozenset[int]) -> Skeleton:
        hollow = _hollow(key)
        text = self._closed(hollow, len(hollow) - 1 in trained)
        padded = {int(i): (left, right) for left, i, right in _PLACEHOLDER.findall(self.render(_hollow(key, pad=" ")))}
        plain = {int(i): (left, right) for left, i, right in _PLACEHOLDER.findall(text)}
        writes_from = {turn: len(self.render(hollow[:turn], True)) for turn in trained}
        parts: list[Part] = []
        suffixes: dict[int, str] = {}
        cursor, order, previous = 0, [], -1
        for match in [*re.finditer("\ue000(\\d+)\ue001", text), None]:
            end = match.start() if match else len(text)
            index = int(match.group(1)) if match else -1
            literal = text[cursor:end]
            spans, split, tail = [(0, TEMPLATE)], None, 0
            if previous in trained:
                tail = self._length_of_end(hollow[: previous + 1], literal)
                suffixes[previous] = literal[:tail]
                spans = [(0, ASSISTANT), (tail, TEMPLATE)]
            if index in trained:
                split = writes_from[index] - cursor
                split += thoughts.length_of_empty(literal[: max(split, 0)], literal[max(split, 0) :])
                if split < tail:
                    return Skeleton(None, suffixes)
                spans.append((split, ASSISTANT))
            parts.append(Part(literal=literal, spans=tuple(spans), split=split))
            if match:
                order.append(index)
                role = ROLE_OF.get(key[index][0], USER)
                role = TEMPLATE if role == ASSISTANT and index not in trained else role
                kept = padded.get(index, ("", ""))
                sides = [len(kept[side]) == len(plain[index][side]) for side in (0, 1)]
                parts.append(Part(message=index, role=role, strip_left=sides[0], strip_right=sides[1]))
                cursor = match.end()
            previous = index
        complete = len(order) == len(set(order)) and trained.issubset(order)
        return Skeleton(tuple(parts) if complete else None, suffixes, len(self._special.findall(text)))

    def _closed(self, messages: Sequence[Message], is_trained: bool) -> str:
        """Append the token at which the model stops, if the template leaves it to the next turn."""
        text = self.render(messages)
        return text.rstrip() + self.closing if self.closing and is_trained else text

    def _length_of_end(self, hollow: Sequence[Message], literal: str) -> int:
        """The length of the end of turn in the literal that follows a turn's content."""
        as_last = self._closed(hollow, True)
        content = as_last.rfind("\ue001") + 1
        suffix = as_last[content : self.end_of_written(as_last, content) or content]
        if suffix and literal.startswith(suffix):
            return len(suffix)
        found = self._special.search(literal)
        return found.end() if found else 0

    def _by_prefixes(
        self, text: str, messages: Sequence[Message], trained: frozenset[int], suffixes: dict[int, str]
    ) -> Rendered:
        turns = {turn: self._turn_by_prefix(text, messages, turn, suffixes.get(turn)) for turn in sorted(trained)}
        return with_turns(text, messages, turns)

    def _turn_by_prefix(self, text: str, messages: Sequence[Message], turn: int, suffix: str | None) -> tuple[int, int]:
        """From the end of the generation prompt to the end of turn."""
        prompt = self.render(messages[:turn], True)
        whole = self._closed(messages[: turn + 1], True)
        end = whole.rfind(suffix) + len(suffix) if suffix else len(whole.rstrip())
        if suffix is None or not text.startswith(whole[:end]) or not whole.startswith(prompt) or not len(prompt) < end:
            raise RowError(
                f"template '{self.name}' rewrites message {turn + 1}, {shorten(messages[turn]['content'])}, so "
                "the tokens that the model must write cannot be identified; change the row, or use another "
                "--template"
            )
        start = len(prompt) + thoughts.length_of_empty(prompt, whole[len(prompt) :])
        return start, end


_PROBE: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]


def _key(messages: Sequence[Message]) -> tuple[Any, ...]:
    """The key of a conversation's skeleton: roles, trained turns, and further keys of messages."""
    return tuple((m["role"], m.get("weight", 1) != 0, "" if len(m) == 2 else _further(m)) for m in messages)


def _further(message: Message) -> str:
    return json.dumps({key: message[key] for key in sorted(message) if key not in ("role", "content")})


def _hollow(key: tuple[Any, ...], pad: str = "") -> list[Message]:
    return [
        {"role": role, "content": f"{pad}\ue000{index}\ue001{pad}", **(json.loads(extra) if extra else {})}
        for index, (role, _, extra) in enumerate(key)
    ]


def _readable(hollow_text: str) -> str:
    return shorten(
        re.sub("\ue000(\\d+)\ue001", lambda match: f"{{message {int(match.group(1)) + 1}}}", hollow_text)[-58:], 80
    )
