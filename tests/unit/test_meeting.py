"""Nodes meet at a port that anybody can connect to: strangers never keep a node out, and a node that errs hears why."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.launcher import lines, listener
from sft.launcher.listener import hello
from sft.launcher.meeting import Coordinator, Member
from sft.launcher.preflight import Ready
from sft.launcher.processes import free_port
from tokenize_data.errors import UserError

LONG = 60.0  # never waited for, unless something is wrong
DECISION = {"run": {}, "folder": "out", "token": "t", "restarts_left": 0}


def ready(node: int) -> Ready:
    return Ready(
        node=node,
        host=f"host{node}",
        processes=1,
        devices="2 CPU cores",
        memory_gib=1,
        disk_gib=1.5,
        clock=0.0,
        facts={"sft": "1"},
    )


def silent(text: str) -> None:
    """What is said is nobody's business here."""


class Meeting:
    """Node 0 at a free port, and whoever connects to it."""

    def __init__(self, nodes: int = 2) -> None:
        self.port, self.said = free_port(), list[str]()
        self.host = Coordinator("127.0.0.1", self.port, nodes, "orders", self.said.append)
        self._stack = contextlib.ExitStack()
        self._stack.callback(self.host.close)

    def foreign_package_warning(self, payload: bytes = b"", is_closed: bool = True) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=LONG)
        with contextlib.suppress(OSError):  # node 0 may have had enough of it
            connection.sendall(payload)
        if is_closed:
            connection.close()
        else:
            self._stack.callback(connection.close)
        return connection

    def guest(self, node: int = 1, run: str = "orders") -> Member:
        guest = Member("127.0.0.1", self.port, node, run, LONG, silent)
        self._stack.callback(guest.close)
        return guest

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


@pytest.fixture
def meeting() -> Iterator[Meeting]:
    with Meeting() as one:
        yield one


NOT_A_NODE = {
    "nothing": b"",
    "half a line": b'{"hello": "sft", "ru',
    "no JSON": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "not UTF-8": b"\xff\xfe\n",
    "null": b'{"node": null}\n',
    "no object": b"[1]\n",
    "deeply nested": b"[" * 3000 + b"\n",
    "infinite": b'{"node": 1e999, "host": ""}\n',
    "text": b'{"hello": "sft", "run": "orders", "node": "1", "host": "x"}\n',
    "a truth": b'{"hello": "sft", "run": "orders", "node": true, "host": "x"}\n',
    "no run": b'{"hello": "sft", "run": null, "node": 1, "host": "x"}\n',
    "no host": b'{"hello": "sft", "run": "orders", "node": 1}\n',
    "huge": b"x" * (1 << 22),
    "a huge number": b'{"node": ' + b"9" * 4100 + b"}\n",
    "node 0": json.dumps(hello("orders", 0, "x")).encode() + b"\n",
    "node 2": json.dumps(hello("orders", 2, "x")).encode() + b"\n",
    "node -1": json.dumps(hello("orders", -1, "x")).encode() + b"\n",
    "another run": json.dumps(hello("other", 1, "x")).encode() + b"\n",
    "a node that goes again": json.dumps(hello("orders", 1, "x")).encode() + b"\n",
    "a node that speaks": json.dumps(hello("orders", 1, "x")).encode() + b"\n{}\n",
}


@pytest.mark.parametrize("name", NOT_A_NODE)
def test_a_stranger_keeps_no_node_out(meeting: Meeting, name: str):
    meeting.foreign_package_warning(NOT_A_NODE[name])
    meeting.guest()
    assert meeting.host.collect(LONG) == [1]
    assert any(line.startswith("node 1 has connected") for line in meeting.said)


@pytest.mark.parametrize("payload", [b"", b'{"hello"', NOT_A_NODE["node 2"][:-1]])
def test_slow_senders_are_not_waited_for(meeting: Meeting, payload: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listener, "_HELLO_SECONDS", 10 * LONG)
    for _ in range(3):
        meeting.foreign_package_warning(payload, is_closed=False)
    meeting.guest()
    assert meeting.host.collect(LONG) == [1]


def test_strangers_that_say_nothing_are_let_go_of(meeting: Meeting, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listener, "_MOST_UNKNOWN", 4)
    held = [meeting.foreign_package_warning(b"x", is_closed=False) for _ in range(5)]
    with contextlib.suppress(ConnectionResetError):
        assert held[0].recv(1) == b""  # closed by node 0
    meeting.guest()
    assert meeting.host.collect(LONG) == [1]


def test_those_who_never_say_who_they_are_have_a_time_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listener, "_HELLO_SECONDS", 0.0)
    with Meeting() as meeting, contextlib.suppress(ConnectionResetError):
        assert meeting.foreign_package_warning(b"x", is_closed=False).recv(1) == b""


def test_two_that_are_the_same_node(meeting: Meeting):
    meeting.guest()
    assert meeting.host.collect(LONG) == [1]
    second = meeting.guest()
    with (
        collecting(meeting),
        pytest.raises(UserError, match=r"stops: --rank 1 is taken by .*: give each of the 2 nodes its own$"),
    ):
        second.decision(LONG, silent)


@pytest.mark.parametrize(
    ("node", "run", "message"),
    [
        (2, "orders", r"stops: --rank 2 is not between 0 and 1: give each of the 2 nodes its own$"),
        (
            1,
            "other",
            r"stops: this is the rendezvous of --run_name orders, not of other: give each run a --port of its own$",
        ),
    ],
)
def test_a_node_that_is_not_of_this_run_hears_why(meeting: Meeting, node: int, run: str, message: str):
    guest = meeting.guest(node, run)
    with collecting(meeting), pytest.raises(UserError, match=message):
        guest.decision(LONG, silent)
    meeting.guest()
    assert meeting.host.collect(LONG) == [1]


def test_a_node_that_left_is_replaced(meeting: Meeting):
    leaving = meeting.foreign_package_warning(NOT_A_NODE["a node that goes again"], is_closed=False)
    assert meeting.host.collect(LONG) == [1]
    leaving.shutdown(socket.SHUT_RDWR)
    meeting.guest()
    assert meeting.host.collect(LONG) == [1]
    assert "node 1 (x) left: waiting for a replacement" in meeting.said


def test_they_start_together_among_strangers(meeting: Meeting):
    guest = meeting.guest()
    assert meeting.host.collect(LONG) == [1]
    said: list[Any] = []

    def other_node() -> None:
        said.append(guest.decision(LONG, silent))
        guest.say_ready(ready(1), LONG)
        said.append("started")

    thread = threading.Thread(target=other_node)
    thread.start()
    for payload in NOT_A_NODE.values():
        meeting.foreign_package_warning(payload)
    nodes = meeting.host.agree(DECISION, [1], ready(0), LONG)
    meeting.host.answer(None)
    thread.join()
    assert [node.host for node in nodes] == ["host0", "host1"]
    assert said == [{**DECISION, "rank": 1, "nodes": 2}, "started"]


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"no JSON\n",
        b"{}\n",
        b'{"ready": null}\n',
        b'{"ready": {"node": 1}}\n',
        b"[" * 3000 + b"\n",
        b"x" * (1 << 21),
    ],
)
def test_a_node_that_cannot_say_that_it_is_ready(meeting: Meeting, said: bytes):
    node = meeting.foreign_package_warning(NOT_A_NODE["a node that goes again"], is_closed=False)
    assert meeting.host.collect(LONG) == [1]

    def answer() -> None:
        node.recv(65536)
        with contextlib.suppress(OSError):
            node.sendall(said)
            node.shutdown(socket.SHUT_WR)

    thread = _later(answer)
    with pytest.raises(UserError, match=r"^node 1 \(x\) disconnected before the start \(.*\): see its output$"):
        meeting.host.agree(DECISION, [1], ready(0), LONG)
    meeting.host.close()
    thread.join()


@pytest.mark.parametrize("change", [{"clock": "now"}, {"facts": []}, {"more": 1}, {"error": 1}, {"processes": None}])
def test_what_a_node_says_of_itself_is_checked(change: dict[str, Any]):
    assert Ready.from_json(ready(1).as_json()) == ready(1)
    with pytest.raises(ValueError, match=r"its |its report"):
        Ready.from_json({**ready(1).as_json(), **change})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "disconnected (the connection was closed)"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "disconnected (it sent 'HTTP/1.1 400"),
        (b"{}\n", "sent no decision that this `sft` understands"),
        (b'{"decision": 1}\n', "sent no decision"),
        (b'{"decision": {"iters": "3"}}\n', "sent no decision"),
        (b"[" * 3000 + b"\n", "which `sft` never does"),
        (b"x" * (1 << 21), "a line of more than 1,048,576 bytes"),
    ],
)
def test_a_node_that_meets_a_stranger_in_node_0_s_place(answer: bytes, message: str):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(answer)

        thread = _later(serve)
        guest = Member("127.0.0.1", server.getsockname()[1], 1, "orders", LONG, silent)
        with pytest.raises(UserError) as error:
            guest.decision(LONG, silent)
        assert message in str(error.value)
        assert "check --addr and --port" in str(error.value)
        guest.close()
        thread.join()


@pytest.mark.parametrize("address", ["a..b", "x" * 70 + ".example", "256.1.1.1"])
def test_an_address_that_is_none(address: str):
    with pytest.raises(UserError, match=r"--addr .* is not known here"):
        Member(address, 1, 1, "orders", 0.0, silent)
    with pytest.raises(UserError, match="node 0 cannot listen on"):
        Coordinator(address, free_port(), 2, "orders", silent)


def test_the_other_end_s_garbage_ends_the_watch_with_its_name():
    ours, theirs = socket.socketpair()
    lost: list[str] = []
    theirs.sendall(b"[" * 3000 + b"\n")
    lines.watch(lines.Line(ours), "node 1 (x)", threading.Event(), lost.append)
    assert lost == ["node 1 (x) is gone: its host or its `sft` ended"]
    ours.close()
    theirs.close()


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
_OBJECTS = st.fixed_dictionaries(
    {},
    optional={
        "hello": st.sampled_from(["sft", "sf"]) | _VALUES,
        "run": st.sampled_from(["orders", "other"]) | _VALUES,
        "node": st.integers(-2, 3) | _VALUES,
        "host": st.just("x") | _VALUES,
        "lost": _VALUES,
        "ready": _VALUES,
    },
)
_PAYLOADS = (
    st.binary(max_size=200)
    | _OBJECTS.map(lambda value: json.dumps(value).encode() + b"\n")
    | st.integers(0, 5000).map(lambda depth: b"[" * depth + b"\n")
    | st.integers(0, 1 << 18).map(lambda size: b"x" * size)
)
_VISITS = st.lists(st.tuples(_PAYLOADS, st.integers(0, 200), st.booleans()), max_size=6)


@settings(max_examples=150, deadline=None)
@given(before=_VISITS, after=_VISITS)
def test_whatever_strangers_send(before: list[tuple[bytes, int, bool]], after: list[tuple[bytes, int, bool]]):
    """Payloads whole or cut short, closed at once or held open, before and after the node has come."""
    with Meeting() as meeting:
        for payload, cut, is_closed in before:
            claims_the_place = _claims(payload, 1) and not is_closed
            meeting.foreign_package_warning(payload[:-cut] if cut or claims_the_place else payload, is_closed)
        guest = meeting.guest()
        assert meeting.host.collect(LONG) == [1]
        for payload, _, is_closed in after:
            meeting.foreign_package_warning(payload, is_closed)
        assert meeting.host.collect(0) == [1]
        meeting.host.answer("enough")
        with pytest.raises(UserError, match="stops: enough"):
            guest.decision(LONG, silent)


def _claims(payload: bytes, node: int) -> bool:
    """Whether it is a node's own word, which nobody can tell from a node."""
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        return json.loads(payload).get("node") == node
    return False


@settings(max_examples=100, deadline=None)
@given(_VALUES)
def test_whatever_a_decision_is(value: Any):
    ours, theirs = socket.socketpair()
    guest = Member.__new__(Member)
    guest._name, guest._line = "node 0", lines.Line(ours)
    theirs.sendall(json.dumps({"decision": value}).encode() + b"\n")
    with pytest.raises(UserError, match="sent no decision"):
        guest.decision(LONG, silent)
    ours.close()
    theirs.close()


@contextlib.contextmanager
def collecting(meeting: Meeting) -> Iterator[None]:
    """Node 0 lets others in meanwhile, however late they come."""
    is_over = threading.Event()

    def collect() -> None:
        while not is_over.wait(0.05):
            meeting.host.collect(0)

    thread = _later(collect)
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _later(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread
