"""Chat templates: a conversation becomes text, and each stretch of the text has a role.

The text is what the template itself renders, always. The spans come from a skeleton: the same conversation with a
placeholder for each content, rendered once for each sequence of roles. What the model has to write in a turn is defined
by generation: it begins where the template's own generation prompt ends, and ends with the end-of-turn token. Where a
skeleton filled with the contents is not the rendered text (the template looks into contents), spans are found by
rendering prefixes of that very conversation.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenize_data.errors import RowError, UserError, shorten
from tokenize_data.rendering import Message as Message  # whoever calls this module passes them
from tokenize_data.rendering import Renderer

TEMPLATE, SYSTEM, USER, ASSISTANT = range(4)
ROLE_NAMES = ("template", "system", "user", "assistant")
_ROLE_OF = {"system": SYSTEM, "developer": SYSTEM, "user": USER, "assistant": ASSISTANT}
_MOST_KEPT = 4096
_PLACEHOLDER = re.compile("(\\s*)\ue000(\\d+)\ue001(\\s*)")


@dataclass(frozen=True)
class Rendered:
    """One document as text. `roles[i]` holds from `starts[i]` to `starts[i + 1]`; `splits` are where the model begins
    to write.
    """

    text: str
    starts: list[int]
    roles: list[int]
    splits: list[int]
    num_special: int | None = None  # special tokens that the template itself wrote; None where that is not known


@dataclass(frozen=True)
class _Part:
    """A piece of a skeleton: a literal with its spans, or (message >= 0) the place of a message's content."""

    literal: str = ""
    spans: tuple[tuple[int, int], ...] = ()  # (start within the literal, role)
    split: int | None = None  # where in the literal the model begins to write
    message: int = -1
    role: int = TEMPLATE
    strip_left: bool = False
    strip_right: bool = False


@dataclass(frozen=True)
class _Skeleton:
    parts: tuple[_Part, ...] | None  # None: contents do not appear once each, in order
    suffixes: dict[int, str]  # turn -> literal between its content and its end of turn, included
    num_special: int = 0


@dataclass
class ChatTemplate:
    """A compiled template, bound to one tokenizer's special tokens."""

    name: str
    source: str
    special_tokens: dict[str, str]
    special_texts: frozenset[str]
    _renderer: Renderer = field(init=False, repr=False)
    _skeletons: dict[tuple[Any, ...], _Skeleton] = field(init=False, default_factory=dict, repr=False)
    _plans: dict[tuple[Any, ...], list[tuple[int, frozenset[int]]]] = field(
        init=False, default_factory=dict, repr=False
    )

    def __post_init__(self) -> None:
        self._renderer = Renderer(self.name, self.source, self.special_tokens)
        alternatives = "|".join(re.escape(text) for text in sorted(self.special_texts, key=len, reverse=True))
        self._special = re.compile(alternatives or r"(?!)")

    def fingerprint(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        """The text that transformers' apply_chat_template gives."""
        return self._renderer(messages, generation_prompt)

    def documents(self, messages: Sequence[Message]) -> list[Rendered]:
        """The documents of a conversation: one, or more where the template shows a turn otherwise once it is
        history.
        """
        key = _key(messages)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MOST_KEPT:  # rows whose messages carry keys of their own, such as a time
                self._plans.clear()
                self._skeletons.clear()
            plan = self._plans[key] = self._plan(messages, key)
        return [self._document(messages[:count], trained) for count, trained in plan]

    def end_of_turn(self) -> str | None:
        """The token that ends the assistant's turn, None if the template has none."""
        suffix = self._skeleton(_key(_PROBE), frozenset([1])).suffixes[1]
        found = self._special.search(suffix)
        return found.group() if found else None

    def check(self) -> None:
        """Refuse a template that cannot be trained with, before any row is read."""
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
        found = self._special.search(text, content.end())
        return found.end() if found else content.end()

    # ---- one document

    def _document(self, messages: Sequence[Message], trained: frozenset[int]) -> Rendered:
        text = self.render(messages)
        skeleton = self._skeleton(_key(messages), trained)
        filled = _fill(skeleton, messages)
        if filled is not None and filled.text == text:
            return filled
        return self._by_prefixes(text, messages, trained, skeleton.suffixes)

    def _skeleton(self, key: tuple[Any, ...], trained: frozenset[int]) -> _Skeleton:
        found = self._skeletons.get((key, trained))
        if found is None:
            found = self._skeletons[(key, trained)] = self._build_skeleton(key, trained)
        return found

    def _build_skeleton(self, key: tuple[Any, ...], trained: frozenset[int]) -> _Skeleton:
        hollow = _hollow(key)
        text = self.render(hollow)
        padded = {int(i): (left, right) for left, i, right in _PLACEHOLDER.findall(self.render(_hollow(key, pad=" ")))}
        plain = {int(i): (left, right) for left, i, right in _PLACEHOLDER.findall(text)}
        writes_from = {turn: len(self.render(hollow[:turn], True)) for turn in trained}
        parts: list[_Part] = []
        suffixes: dict[int, str] = {}
        cursor, order, previous = 0, [], -1
        for match in [*re.finditer("\ue000(\\d+)\ue001", text), None]:
            end = match.start() if match else len(text)
            index = int(match.group(1)) if match else -1
            literal = text[cursor:end]
            spans, split, tail = [(0, TEMPLATE)], None, 0
            if previous in trained:
                found = self._special.search(literal)
                tail = found.end() if found else 0
                suffixes[previous] = literal[:tail]
                spans = [(0, ASSISTANT), (tail, TEMPLATE)]
            if index in trained:
                split = writes_from[index] - cursor
                if split < tail:
                    return _Skeleton(None, suffixes)
                spans.append((split, ASSISTANT))
            parts.append(_Part(literal=literal, spans=tuple(spans), split=split))
            if match:
                order.append(index)
                role = _ROLE_OF.get(key[index][0], USER)
                role = TEMPLATE if role == ASSISTANT and index not in trained else role
                kept = padded.get(index, ("", ""))
                sides = [len(kept[side]) == len(plain[index][side]) for side in (0, 1)]
                parts.append(_Part(message=index, role=role, strip_left=sides[0], strip_right=sides[1]))
                cursor = match.end()
            previous = index
        complete = len(order) == len(set(order)) and trained.issubset(order)
        return _Skeleton(tuple(parts) if complete else None, suffixes, len(self._special.findall(text)))

    def _by_prefixes(
        self, text: str, messages: Sequence[Message], trained: frozenset[int], suffixes: dict[int, str]
    ) -> Rendered:
        turns = {turn: self._turn_by_prefix(text, messages, turn, suffixes.get(turn)) for turn in sorted(trained)}
        marks: list[tuple[int, int, int]] = []  # (start, end, role), in order
        cursor = 0
        for index, message in enumerate(messages):
            if index in turns:
                marks.append((*turns[index], ASSISTANT))
                cursor = turns[index][1]
            elif message["role"] != "assistant" and (content := message["content"].strip()):
                limit = min((start for turn, (start, _) in turns.items() if turn > index), default=len(text))
                found = text.find(content, cursor, limit)
                if found >= 0:
                    cursor = found + len(content)
                    marks.append((found, cursor, _ROLE_OF.get(message["role"], USER)))
        starts, roles = [0], [TEMPLATE]
        for start, end, role in marks:
            starts += [start, end]
            roles += [role, TEMPLATE]
        return Rendered(text, starts, roles, [start for start, _, role in marks if role == ASSISTANT])

    def _turn_by_prefix(self, text: str, messages: Sequence[Message], turn: int, suffix: str | None) -> tuple[int, int]:
        """From the end of the generation prompt to the end of turn."""
        prompt = self.render(messages[:turn], True)
        whole = self.render(messages[: turn + 1])
        end = whole.rfind(suffix) + len(suffix) if suffix else len(whole.rstrip())
        if suffix is None or not text.startswith(whole[:end]) or not whole.startswith(prompt) or not len(prompt) < end:
            raise RowError(
                f"template '{self.name}' rewrites message {turn + 1}, {shorten(messages[turn]['content'])}, so that "
                "it cannot be told "
                "which tokens the model has to write; change the row, or use another --template"
            )
        return len(prompt), end


_PROBE: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]


def _key(messages: Sequence[Message]) -> tuple[Any, ...]:
    """What of a conversation decides its skeleton: roles, which turns are trained, and any further keys of a
    message.
    """
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


def _fill(skeleton: _Skeleton, messages: Sequence[Message]) -> Rendered | None:
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
