"""A judge model rates answers against references from 0 to 1, or compares two answers in both orders. Its JSON replies
are checked, and asked again if invalid. Verdicts are kept in judge.jsonl, so none is paid for twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from sft.evaluate.client import Client, ServerError, in_parallel
from sft.evaluate.lines import LineStore, Record, fingerprint
from tokenize_data.errors import UserError, shorten

_ATTEMPTS = 3  # attempts to get a valid reply
_REPLY_TOKENS = 300
_MOST_CHARACTERS = 100_000  # more than this many tokens take
_CHARACTERS_A_TOKEN = 3.5
_STOPS_ALL = (400, 401, 403, 404, 422)  # statuses that all requests would get
SCORE, FIRST, SECOND, TIE = "score", "first", "second", "tie"
_RATE = 'Reply with one JSON object: {"reason": "one or two sentences", "score": a number from 0 to 1}.'
_CHOOSE = (
    'Which answer is better by these criteria? Reply with one JSON object: {"reason": "...", "better": "first" or '
    '"second" or "tie"}.'
)
_NUMBER = {"type": "number", "minimum": 0, "maximum": 1}
_VERDICT = {"type": "string", "enum": [FIRST, SECOND, TIE]}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A request to the judge. `other` is the second answer in a comparison, None for a rating."""

    question: str
    references: tuple[str, ...]
    answer: str
    other: str | None = None

    def messages(self, rubric: str) -> list[dict[str, str]]:
        parts = [_part("question", self.question)]
        parts += [_part("reference answer", reference) for reference in self.references]
        if self.other is None:
            parts += [_part("answer to grade", self.answer), _RATE]
        else:
            parts += [_part("first answer", self.answer), _part("second answer", self.other), _CHOOSE]
        return [{"role": "system", "content": rubric}, {"role": "user", "content": "\n\n".join(parts)}]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The cost of what is not asked yet."""

    requests: int
    tokens_in: int
    tokens_out: int
    price: float | None

    def __str__(self) -> str:
        text = f"{self.requests:,} requests, about {self.tokens_in:,} tokens in and at most {self.tokens_out:,} out"
        return text + (f", at most about {self.price:,.2f}" if self.price is not None else "")


class Judge:
    """Asks one model on one server with one rubric; `store` keeps the verdicts."""

    def __init__(self, client: Client, model: str, rubric: str, store: LineStore, workers: int) -> None:
        self._client, self._model, self._rubric, self._store, self._workers = client, model, rubric, store, workers
        self._takes_schema = True

    def estimate(self, questions: Sequence[Question], prices: tuple[float, float] | None = None) -> Estimate:
        """Estimate the cost. `prices` are per million input and output tokens."""
        left = self._left(questions)
        characters = sum(len(message["content"]) for question in left for message in question.messages(self._rubric))
        tokens_in, tokens_out = int(characters / _CHARACTERS_A_TOKEN), len(left) * _REPLY_TOKENS
        price = (tokens_in * prices[0] + tokens_out * prices[1]) / 1e6 if prices is not None else None
        return Estimate(requests=len(left), tokens_in=tokens_in, tokens_out=tokens_out, price=price)

    def ask(
        self, questions: Sequence[Question], tell: Callable[[int], None] = lambda done: None
    ) -> tuple[list[Record | None], list[str]]:
        """Ask all questions. Returns verdicts, None for failed ones, and the reasons of failures."""
        left = self._left(questions)
        failures: list[str] = []
        done = len(questions) - len(left)
        tell(done)
        for question, verdict in in_parallel(self._client, self._verdict, left, self._workers):
            if isinstance(verdict, ServerError):
                if verdict.status in _STOPS_ALL:
                    raise UserError(f"the judge refuses: {verdict}")
                failures.append(str(verdict))
            else:
                self._store.add({"id": self._id(question), **verdict})
            done += 1
            tell(done)
        return [self._store.records.get(self._id(question)) for question in questions], failures

    def _left(self, questions: Sequence[Question]) -> list[Question]:
        unique = {self._id(question): question for question in questions}
        return [question for name, question in unique.items() if name not in self._store.records]

    def _id(self, question: Question) -> str:
        return fingerprint(self._model, question.messages(self._rubric))

    def _verdict(self, question: Question) -> Record:
        key = SCORE if question.other is None else "better"
        messages = question.messages(self._rubric)
        for attempt in range(_ATTEMPTS):
            reply = self._reply(messages, key)
            try:
                return read_verdict(reply, key)
            except ValueError as error:
                if attempt == _ATTEMPTS - 1:
                    raise ServerError(f"the judge's reply cannot be used ({error}): {shorten(reply, 100)}") from error
                remark = f"That cannot be used: {error}. Reply with the JSON object alone."
                said = {"role": "assistant", "content": reply[:_MOST_CHARACTERS]}
                messages = [*question.messages(self._rubric), said, {"role": "user", "content": remark}]
        raise AssertionError("unreachable")

    def _reply(self, messages: list[dict[str, str]], key: str) -> str:
        request: dict[str, Any] = {
            "model": self._model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": _REPLY_TOKENS,
        }
        try:
            content = self._client.post("chat/completions", request | (_schema(key) if self._takes_schema else {}))
        except ServerError as error:
            if not (self._takes_schema and error.status in (400, 422) and "response_format" in str(error)):
                raise
            self._takes_schema = False  # older servers do not support it; replies are checked anyway
            content = self._client.post("chat/completions", request)
        try:
            return str(content["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(f"{self._client.url}: the answer has no choices[0].message.content") from error


def read_verdict(reply: str, key: str) -> Record:
    """Parse and check a reply. ValueError says what is wrong."""
    begin, end = reply.find("{"), reply.rfind("}") + 1
    if begin < 0 or end <= begin:
        raise ValueError("no JSON object")
    if end - begin > _MOST_CHARACTERS:
        raise ValueError(f"too long: {end - begin:,} characters")
    try:
        content = json.loads(reply[begin:end])
        reason = str(content.get("reason", ""))[:2000]
    except (ValueError, RecursionError) as error:
        raise ValueError("not valid JSON") from error
    value = content.get(key)
    if key == SCORE:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"score is {_named(value)}, not a number from 0 to 1")
        value = float(value)
    elif value not in (FIRST, SECOND, TIE):
        raise ValueError(f"better is {_named(value)}, not first, second or tie")
    return {key: value, "reason": reason}


def both_orders(question: Question) -> tuple[Question, Question]:
    """The comparison in both orders, since judges prefer one position."""
    assert question.other is not None
    swapped = Question(
        question=question.question, references=question.references, answer=question.other, other=question.answer
    )
    return question, swapped


def preference(verdict: Record | None, swapped: Record | None) -> float | None:
    """1 if the first answer wins in both orders, 0 if it loses in both, 0.5 otherwise."""
    if verdict is None or swapped is None:
        return None
    if verdict["better"] == FIRST and swapped["better"] == SECOND:
        return 1.0
    return 0.0 if verdict["better"] == SECOND and swapped["better"] == FIRST else 0.5


def read_rubric(path: Path | None) -> str:
    if path is None:
        return (resources.files("sft.evaluate") / "rubric.txt").read_text()
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"--judge_rubric {path}: {reason}: give a text file that says what is rated") from error
    if not text.strip():
        raise UserError(f"--judge_rubric {path} is empty: say what is rated, and what 0 and 1 mean")
    return text


def _named(value: Any) -> str:
    return "nested" if isinstance(value, dict | list) else shorten(value)


def _part(name: str, text: str) -> str:
    return f"<{name}>\n{text}\n</{name}>"


def _schema(key: str) -> dict[str, Any]:
    properties = {"reason": {"type": "string"}, key: _NUMBER if key == SCORE else _VERDICT}
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}
    }
