"""What a server answers, and what a judge says in it. One request fails with a reason, or there is a verdict that can
be kept.
"""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

from sft.evaluate.client import Client, ServerError
from sft.evaluate.judge import SCORE, read_verdict
from sft.evaluate.lines import as_line

_HANG_SECONDS = 300.0
_SERVER = socket.create_server(("127.0.0.1", 0), backlog=64)
_ADDRESS = _SERVER.getsockname()
_CLIENT = Client(url=f"http://127.0.0.1:{_ADDRESS[1]}", retries=0, timeout_seconds=_HANG_SECONDS)
_ANSWERS: list[bytes] = []
_CONNECT = socket.create_connection

PREFIX = 1  # bytes before the JSON


def _serve() -> None:
    while True:
        connection, _ = _SERVER.accept()
        with connection:
            connection.recv(65536)
            if _ANSWERS:
                connection.sendall(_ANSWERS[0])


def _only_here(address: tuple[str, int], *arguments: Any, **options: Any) -> socket.socket:
    if tuple(address) != _ADDRESS:
        raise ConnectionRefusedError("no other host")  # a redirect
    return _CONNECT(address, *arguments, **options)


socket.create_connection = _only_here
threading.Thread(target=_serve, daemon=True).start()
_BODY = json.dumps({"choices": [{"message": {"content": '{"score": 1}'}}]}).encode()
SEEDS = [
    b"s" + text
    for text in (
        b'{"score": 0.5, "reason": "r"}',
        b'Sure:\n```json\n{"better": "tie"}\n```',
        b"{" * 900 + b"}" * 900,
        b"",
    )
]
SEEDS += [
    b"h" + head + _BODY for head in (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\n")
]
SEEDS += [
    b"hHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"hHTTP/1.1 429 Slow\r\nRetry-After: \xb2\r\n\r\n{}",
    b"hHTTP/1.1 307 X\r\nLocation: http://[\r\n\r\n",
    b"hHTTP/1.1 301 X\r\nLocation: ftp://127.0.0.1/\r\n\r\n",
    b"h",
]


def one(data: bytes) -> None:
    if data[:1] == b"h":
        _ANSWERS[:] = [data[1:]]
        try:
            content = _CLIENT.get("models")
        except ServerError as error:
            assert len(str(error)) < 2000
            return
        assert isinstance(content, dict)
        return
    text = data[1:].decode(errors="surrogateescape")
    for key in (SCORE, "better"):
        try:
            verdict = read_verdict(text, key)
        except ValueError as error:
            assert not isinstance(error, json.JSONDecodeError | UnicodeError), error
            assert len(str(error)) < 500
            continue
        assert json.loads(as_line({"id": "x", **verdict}))[key] == verdict[key]
        assert isinstance(verdict[key], str) or 0 <= verdict[key] <= 1
