"""What strangers and nodes say where the nodes of a run meet. A stranger keeps no node out; a line is a message, or the
connection ends.
"""

from __future__ import annotations

import contextlib
import json
import socket

from sft.launcher.lines import Line
from sft.launcher.listener import Listener, hello
from sft.launcher.preflight import Ready

_LISTENING = socket.create_server(("127.0.0.1", 0))
_ADDRESS = _LISTENING.getsockname()
_LISTENER = Listener(_LISTENING)
_READY = Ready(
    node=1,
    host="h",
    processes=2,
    devices="2 GPUs",
    memory_gib=1.0,
    disk_gib=2.0,
    clock=3.0,
    facts={"sft": "1"},
    error=None,
)
_HANG_SECONDS = 300.0
SEEDS = [
    json.dumps(message).encode() + b"\n"
    for message in (hello("r", 1, "h"), {"node": None}, {"ready": _READY.as_json()}, {"ping": True})
]
SEEDS += [
    b"",
    b"\n",
    b"{",
    b"[" * 3000 + b"\n",
    b'{"hello": "sft", "run": "r", "node": 1e999, "host": 5}\n',
    b"GET / HTTP/1.1\r\n\r\n",
]

PREFIX = 0  # bytes before the JSON


def one(data: bytes) -> None:
    _as_a_line(data)
    _at_the_listener(data)


def _as_a_line(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.close()
        line = Line(ours)
        with contextlib.suppress(OSError):
            while True:
                message = line.receive(_HANG_SECONDS)
                with contextlib.suppress(ValueError):
                    Ready.from_json(message.get("ready"))


def _at_the_listener(data: bytes) -> None:
    with socket.create_connection(_ADDRESS, timeout=_HANG_SECONDS) as stranger, contextlib.suppress(OSError):
        stranger.sendall(data)
    with socket.create_connection(_ADDRESS, timeout=_HANG_SECONDS) as node:
        node.sendall(json.dumps(hello("the run", 1, "me")).encode() + b"\n")
        while True:
            arrival = _LISTENER.arrivals.get(timeout=_HANG_SECONDS)
            arrival.line.close()
            if arrival.run == "the run":
                return
