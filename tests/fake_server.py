"""An OpenAI-compatible server on this machine for tests, which answers as it is told to, and misbehaves when asked
to.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = str | tuple[int, str]  # the text of an answer, or a status and a body


@dataclass
class Fake:
    """What was asked, and how to answer. `troubles` come first: one each request, until there are none left."""

    reply: Callable[[dict[str, Any]], Reply]
    troubles: list[Callable[[], tuple[int, bytes, dict[str, str]]]] = field(default_factory=list)
    models: tuple[str, ...] = ("model-1",)
    requests: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def answer(self, path: str, content: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        reply = self.reply(content)
        if isinstance(reply, tuple):
            return reply[0], reply[1].encode(), {}
        choice = {"text": reply} if path == "/v1/completions" else {"message": {"role": "assistant", "content": reply}}
        usage = {"completion_tokens": len(reply.split())}
        return 200, json.dumps({"choices": [{**choice, "finish_reason": "stop"}], "usage": usage}).encode(), {}


@contextmanager
def serve(fake: Fake) -> Iterator[Fake]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, json.dumps({"data": [{"id": name} for name in fake.models]}).encode(), {})

        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with fake.lock:
                fake.requests.append((self.path, content, dict(self.headers)))
                trouble = fake.troubles.pop(0) if fake.troubles else None
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that did not want to wait
                self._send(*(trouble() if trouble is not None else fake.answer(self.path, content)))

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def status(code: int, body: str = "", **headers: str) -> Callable[[], tuple[int, bytes, dict[str, str]]]:
    return lambda: (code, body.encode(), {name.replace("_", "-"): value for name, value in headers.items()})


def silent(until: threading.Event) -> Callable[[], tuple[int, bytes, dict[str, str]]]:
    """Nothing is said until the event; it should be set before the server is closed."""

    def wait() -> tuple[int, bytes, dict[str, str]]:
        until.wait()
        return 200, b"{}", {}

    return wait


@dataclass
class Flood:
    """What a server that does not stop has sent, and whether nobody listens any more."""

    url: str = ""
    sent: int = 0
    gave_up: threading.Event = field(default_factory=threading.Event)


@contextmanager
def flood(code: int, is_chunked: bool, size: int, step: int = 2**20) -> Iterator[Flood]:
    """Each answer is `size` bytes, `step` at a time."""
    made = Flood()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(code)
            self.send_header(*(("Transfer-Encoding", "chunked") if is_chunked else ("Content-Length", str(size))))
            self.end_headers()
            piece = b"x" * step
            framed = b"%x\r\n%s\r\n" % (step, piece) if is_chunked else piece
            with contextlib.suppress(OSError):
                while made.sent < size:
                    self.wfile.write(framed)
                    made.sent += step
            self.close_connection = True
            made.gave_up.set()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
