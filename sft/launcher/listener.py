"""Accepts connections on node 0 from peers that name this run and their node number. All others are dropped."""

from __future__ import annotations

import contextlib
import queue
import selectors
import socket
import threading
import time
from dataclasses import dataclass

from sft.launcher.lines import Line, parsed

_HELLO_SECONDS, _HELLO_BYTES = 10.0, 4096
_MOST_UNKNOWN = 128  # limit of connections that have not identified themselves
_POLL_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A connection that identified itself as a node of some run."""

    run: str
    node: int
    host: str
    line: Line


def hello(run: str, node: int, host: str) -> dict[str, object]:
    """The first message of a node."""
    return {"hello": "sft", "run": run, "node": node, "host": host}


class Listener:
    """Listens from the start, so that early nodes can connect. One thread reads from all connections at the same time:
    scanners and misdirected programs must not keep nodes out.
    """

    def __init__(self, listening: socket.socket) -> None:
        self.arrivals: queue.Queue[Arrival] = queue.Queue()
        self._listening = listening
        self._is_closed = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._unknown: dict[socket.socket, tuple[bytes, float]] = {}  # received bytes, and the deadline for more
        listening.setblocking(False)
        self._woken, self._wake = socket.socketpair()
        for source in (listening, self._woken):
            self._selector.register(source, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_closed.set()
        self._wake.close()
        self._thread.join()
        self._selector.close()
        for connection in [self._listening, self._woken, *self._unknown]:
            connection.close()
        while not self.arrivals.empty():
            self.arrivals.get().line.close()

    def _serve(self) -> None:
        while not self._is_closed.is_set():
            for key, _ in self._selector.select(_POLL_SECONDS):
                assert isinstance(key.fileobj, socket.socket)
                if key.fileobj is self._listening:
                    self._accept()
                elif key.fileobj is not self._woken:
                    self._read(key.fileobj)
            for connection in [one for one, (_, until) in self._unknown.items() if time.monotonic() > until]:
                self._drop(connection)

    def _accept(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError:  # the peer left, or too many files are open: the next one may succeed
            self._is_closed.wait(0.01)
            return
        if len(self._unknown) >= _MOST_UNKNOWN:
            self._drop(next(iter(self._unknown)))
        connection.setblocking(False)
        self._unknown[connection] = (b"", time.monotonic() + _HELLO_SECONDS)
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> None:
        said, until = self._unknown.get(connection, (b"", 0.0))
        try:
            part = connection.recv(_HELLO_BYTES)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        said += part
        line, newline, rest = said.partition(b"\n")
        if newline and (found := _named(line)) is not None:
            self._selector.unregister(connection)
            del self._unknown[connection]
            run, node, host = found
            self.arrivals.put(Arrival(run=run, node=node, host=host, line=Line(connection, rest)))
        elif not part or newline or len(said) > _HELLO_BYTES:
            self._drop(connection)
        else:
            self._unknown[connection] = (said, until)

    def _drop(self, connection: socket.socket) -> None:
        if self._unknown.pop(connection, None) is not None:
            self._selector.unregister(connection)
        with contextlib.suppress(OSError):
            connection.close()


def _named(line: bytes) -> tuple[str, int, str] | None:
    """Parse (run, node, host); None if the peer is not an `sft` node."""
    message = parsed(line)
    if message is None or message.get("hello") != "sft":
        return None
    run, node, host = (message.get(key) for key in ("run", "node", "host"))
    if not isinstance(run, str) or not isinstance(host, str) or not isinstance(node, int) or isinstance(node, bool):
        return None
    return run, node, "".join(character if character.isprintable() else "?" for character in host[:255])
