"""The client and the judge against a server on this machine that is busy, slow, broken or wrong; and `--server_url`."""

from __future__ import annotations

import json
import logging
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from sft.evaluate.client import Client, ServerError, in_parallel
from sft.evaluate.judge import Judge, Question, both_orders, preference, read_rubric, read_verdict
from sft.evaluate.lines import LineStore
from tests import fake_server
from tests.fake_server import Fake, flood, serve, silent, status
from tokenize_data.errors import UserError

KEY = "sk-secret-0123456789abcdef"
QUESTIONS = [
    Question(question=f"q{n}", references=(f"right {n}",), answer=f"right {n}" if n % 2 else "wrong") for n in range(6)
]


def grade(request: dict[str, Any]) -> str:
    """1 where the graded answer is the reference."""
    said = request["messages"][1]["content"]
    reference, answer = (
        said.split(f"<{name}>\n")[1].split("\n</")[0] for name in ("reference answer", "answer to grade")
    )
    return json.dumps({"reason": "compared", "score": float(reference == answer)})


def judge_of(fake: Fake, store: LineStore, workers: int = 3, **options: Any) -> Judge:
    client = Client(url=fake.url, first_wait_seconds=0.01, **{"timeout_seconds": 5.0, **options})
    return Judge(client, "judge", "Grade.", store, workers)


def test_troubles_pass(tmp_path: Path) -> None:
    """Busy, broken, silent, no JSON, no object, no choices, a verdict out of range: each is tried again, and every
    answer is rated.
    """
    is_over = threading.Event()
    troubles = [
        status(429, "slow down", Retry_After="0.05"),
        status(500),
        status(503),
        silent(is_over),
        status(200, "<html>"),
        status(200, "[1]"),
        status(200, json.dumps({"choices": [{"message": {"content": '{"score": 7}'}}]})),
        status(200, json.dumps({"choices": [{"message": {"content": "I think it is fine"}}]})),
    ]
    with (
        serve(Fake(grade, troubles)) as fake,
        LineStore(tmp_path / "judge.jsonl", lambda record: record["id"]) as store,
    ):
        verdicts, failures = judge_of(fake, store, workers=1, timeout_seconds=2.0).ask(QUESTIONS)
        is_over.set()
    assert failures == []
    assert [verdict and verdict["score"] for verdict in verdicts] == [0.0, 1.0] * 3
    assert len(fake.requests) >= len(QUESTIONS) + 8
    reminder = next(content for _, content, _ in fake.requests if len(content["messages"]) == 4)
    assert (
        "score is 7, not a number from 0 to 1. Reply with the JSON object alone." in reminder["messages"][3]["content"]
    )


def test_verdicts_are_kept_and_not_asked_again(tmp_path: Path) -> None:
    with serve(Fake(grade)) as fake:
        for _ in range(2):
            with LineStore(tmp_path / "judge.jsonl", lambda record: record["id"]) as store:
                judge = judge_of(fake, store)
                estimate = judge.estimate([*QUESTIONS, QUESTIONS[0]], (1.0, 10.0))
                verdicts, _ = judge.ask(QUESTIONS)
                assert all(verdicts)
        assert len(fake.requests) == len(QUESTIONS)
    assert (estimate.requests, estimate.price) == (0, 0.0)


def test_an_estimate_comes_first(tmp_path: Path) -> None:
    with serve(Fake(grade)) as fake, LineStore(tmp_path / "judge.jsonl", lambda record: record["id"]) as store:
        estimate = judge_of(fake, store).estimate([*QUESTIONS, QUESTIONS[0]], (1.0, 10.0))
        assert fake.requests == []
    assert estimate.requests == len(QUESTIONS)
    assert estimate.tokens_out == 6 * 300
    assert estimate.price == pytest.approx((estimate.tokens_in + 10 * estimate.tokens_out) / 1e6)
    assert str(estimate).startswith("6 requests, about ")


def test_an_interruption_keeps_what_was_said(tmp_path: Path) -> None:
    def tell(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with serve(Fake(grade)) as fake:
        with (
            LineStore(tmp_path / "judge.jsonl", lambda record: record["id"]) as store,
            pytest.raises(KeyboardInterrupt),
        ):
            judge_of(fake, store, workers=1).ask(QUESTIONS, tell)
        assert len((tmp_path / "judge.jsonl").read_text().splitlines()) == 2


def test_answers_that_cannot_be_rated_are_counted(tmp_path: Path) -> None:
    def sulk(request: dict[str, Any]) -> str:
        return "no comment" if "q3" in request["messages"][1]["content"] else grade(request)

    with serve(Fake(sulk)) as fake, LineStore(tmp_path / "judge.jsonl", lambda record: record["id"]) as store:
        verdicts, failures = judge_of(fake, store).ask(QUESTIONS)
    assert [verdict is None for verdict in verdicts] == [False, False, False, True, False, False]
    assert failures == ["the judge's reply cannot be used (no JSON object): 'no comment'"]


def test_a_refused_key_stops_and_is_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    refusal = (401, f'{{"error": "Incorrect API key provided: {KEY}, or {KEY[:8]}***{KEY[-8:]}"}}')
    with (
        caplog.at_level(logging.DEBUG),
        serve(Fake(lambda request: refusal)) as fake,
        LineStore(tmp_path / "judge.jsonl", lambda record: record["id"]) as store,
        pytest.raises(UserError, match=r"the judge refuses: .*401") as caught,
    ):
        judge_of(fake, store).ask(QUESTIONS)
    assert fake.requests[0][2]["Authorization"] == f"Bearer {KEY}"
    shown = str(caught.value) + caplog.text + (tmp_path / "judge.jsonl").read_text()
    assert not any(part in shown for part in (KEY, KEY[:8], KEY[-8:]))
    assert len(fake.requests) < len(QUESTIONS) + 1


class _Waits(threading.Event):
    """Waits for no time, and remembers for how long it was to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout or 0.0)
        return self.is_set()


def test_no_more_requests_a_minute_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft.evaluate.client.time", types.SimpleNamespace(monotonic=lambda: 100.0))  # no time passes
    with serve(Fake(grade)) as fake:
        client = Client(url=fake.url, per_minute=1200, stopped=_Waits())
        for _ in range(4):
            client.get("models")
    assert client.stopped.seconds == pytest.approx([0.0, 0.05, 0.10, 0.15])


def test_servers_without_structured_output(tmp_path: Path) -> None:
    def old(request: dict[str, Any]) -> fake_server.Reply:
        return (400, "unknown field response_format") if "response_format" in request else grade(request)

    with serve(Fake(old)) as fake, LineStore(tmp_path / "judge.jsonl", lambda record: record["id"]) as store:
        verdicts, _ = judge_of(fake, store, workers=1).ask(QUESTIONS)
    assert all(verdicts)
    assert len(fake.requests) == len(QUESTIONS) + 1


def test_pairs_are_asked_in_both_orders(tmp_path: Path) -> None:
    def likes(request: dict[str, Any]) -> str:
        said = request["messages"][1]["content"]
        first, second = (said.split(f"<{name} answer>\n")[1].split("\n</")[0] for name in ("first", "second"))
        if "same" in first + second:
            return '{"reason": "the first is always better", "better": "first"}'
        return json.dumps(
            {"reason": "", "better": "first" if first == "good" else "second" if second == "good" else "tie"}
        )

    pairs = [("good", "bad"), ("bad", "good"), ("same 1", "same 2"), ("bad", "bad")]
    orders = [both_orders(Question(question="q", references=("r",), answer=a, other=b)) for a, b in pairs]
    with serve(Fake(likes)) as fake, LineStore(tmp_path / "judge.jsonl", lambda record: record["id"]) as store:
        verdicts, _ = judge_of(fake, store).ask([question for both in orders for question in both])
    assert [preference(*verdicts[n : n + 2]) for n in range(0, 8, 2)] == [1.0, 0.0, 0.5, 0.5]
    assert preference(None, verdicts[0]) is None


@pytest.mark.parametrize(
    ("reply", "wrong"),
    [
        ('{"score": 0.5', "no JSON object"),
        ('{"score": 0.5,}', "not valid JSON"),
        ('{"score": "0.5"}', "score is '0.5', not a number"),
        ('{"score": -0.1}', "score is -0.1, not a number from 0 to 1"),
        ('{"score": NaN}', "score is nan"),
        ("{}", "score is None"),
        ('{"score": ' + "[" * 50_000 + "}", "not valid JSON"),
        ('{"score": ' + "[" * 900 + "]" * 900 + "}", "score is nested|not valid JSON"),
        ('{"reason": ' + "[" * 900 + "]" * 900 + "}", "score is None|not valid JSON"),
        ("{" * 300_000, "no JSON object"),
        ("{" * 300_000 + "}", "too long"),
        ('{"score": ' + "9" * 10_000 + "}", "not valid JSON"),
        ('{"score": 1e999}', "score is inf"),
        ('{"score": true}', "score is True"),
    ],
)
def test_verdicts_are_checked(reply: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong.replace("(", r"\(")):
        read_verdict(reply, "score")
    assert read_verdict('Sure:\n```json\n{"score": 1, "reason": "ok"}\n```', "score") == {"score": 1.0, "reason": "ok"}


def test_a_rubric_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "rubric.txt").write_text("Only rate politeness.")
    assert read_rubric(tmp_path / "rubric.txt") == "Only rate politeness."
    assert "score from 0 to 1" in read_rubric(None)
    (tmp_path / "empty.txt").write_text(" ")
    for name, message in (("empty.txt", "is empty: say what is rated"), ("none.txt", "No such file")):
        with pytest.raises(UserError, match=message):
            read_rubric(tmp_path / name)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "not a server address"),
        ("http://me:pass@host/v1", "holds a password"),
        ("ftp://x", "not a server address"),
    ],
)
def test_addresses(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Client(url=url)
    assert "pass@" not in str(caught.value)
    assert Client(url="http://h:1").url == Client(url="http://h:1/v1/").url == "http://h:1/v1"


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(ServerError, match="Connection refused"):
        Client(url="http://127.0.0.1:9", retries=1, first_wait_seconds=0.01).get("models")


class _StopsWhenWaiting(threading.Event):
    """An interrupt that comes while two requests wait for their next try."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def wait(self, timeout: float | None = None) -> bool:
        self.waits += (timeout or 0.0) > 1.0
        if self.waits >= 2:
            self.set()
        return super().wait(timeout)


def test_an_interrupt_does_not_wait_for_retries() -> None:
    """All requests fail and would be tried again for minutes; each is asked once."""
    with serve(Fake(lambda request: (503, "busy"))) as fake:
        client = Client(url=fake.url, first_wait_seconds=600.0, stopped=_StopsWhenWaiting())
        asked = in_parallel(client, lambda item: client.post("x", {}), [1, 2, 3], 2)
        assert all(isinstance(result, ServerError) for _, result in asked)
        assert len(fake.requests) == 2


@pytest.mark.parametrize(
    ("header", "waits"),
    [
        ("7", 7.0),
        ("\u00b2", 1.0),
        ("1.5", 1.5),
        ("-3", 1.0),
        ("nan", 1.0),
        ("9" * 400, 60.0),
        ("Wed, 21 Oct 2065 07:28:00 GMT", 1.0),
    ],
)
def test_retry_after_is_a_number_or_nothing(header: str, waits: float) -> None:
    with serve(Fake(grade, [status(429, "slow down", Retry_After=header)])) as fake:
        client = Client(url=fake.url, stopped=_Waits())
        client.post(
            "chat/completions", {"messages": [{}, {"content": "<reference answer>\na\n</<answer to grade>\na\n</"}]}
        )
    assert client.stopped.seconds[1] == pytest.approx(waits, rel=0.25 if waits == 1.0 else 1e-9)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[" * 100_000, "the answer is not JSON"),
        ('{"a":' * 100_000, "the answer is not JSON"),
        ("9" * 10_000, "the answer is not JSON"),
        ('{"choices": [{"message": {"content": "x"}}]', "the answer is not JSON"),
    ],
)
def test_answers_that_are_no_json(body: str, message: str) -> None:
    with serve(Fake(lambda request: (200, body))) as fake, pytest.raises(ServerError, match=message):
        Client(url=fake.url, retries=0).post("chat/completions", {})


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("code", [200, 400])
def test_an_endless_answer_is_not_read_to_its_end(code: int, is_chunked: bool) -> None:
    """A gigabyte would be sent; a small part of it is read."""
    with flood(code, is_chunked, 10**9) as server:
        with pytest.raises(ServerError) as caught:
            Client(url=server.url, retries=0).post("chat/completions", {})
        assert server.gave_up.wait(600)
        assert server.sent < 100e6
    assert ("longer than 32 MB" if code == 200 else "400 Bad Request: 'xxx") in str(caught.value)


def test_an_answer_that_trickles_in_is_given_up() -> None:
    """A byte now and then: never quiet for long, and never whole."""
    with flood(200, False, 10**9, step=1) as server, pytest.raises(ServerError, match=r"incomplete after 0\.2 s"):
        Client(url=server.url, retries=0, timeout_seconds=0.2).post("chat/completions", {})


def test_a_redirect_does_not_carry_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with (
        serve(Fake(lambda request: "x")) as other,
        serve(Fake(lambda request: "x", [status(307, Location=f"{other.url}/v1/x")])) as fake,
    ):
        with pytest.raises(ServerError):
            Client(url=fake.url, retries=0).post("chat/completions", {})
        assert not any("Authorization" in headers for _, _, headers in other.requests)
