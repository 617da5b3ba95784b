"""Node 0 accepts connections here: peers that name this run and their node number. All others are dropped."""

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
_MOST_UNKNOWN = 128  # of connections that have not said who they are
_POLL_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A node of some run at the door."""

    run: str
    node: int
    host: str
    line: Line


def hello(run: str, node: int, host: str) -> dict[str, object]:
    """What a node says first."""
    return {"hello": "sft", "run": run, "node": node, "host": host}


class Door:
    """Listens from the beginning, so that nodes that come early find somebody. A thread reads from all that connect at
    once.

    A port in a network is probed, by scanners and by programs that have the wrong number: none of them may keep a node
    out.
    """

    def __init__(self, listening: socket.socket) -> None:
        self.arrivals: queue.Queue[Arrival] = queue.Queue()
        self._listening = listening
        self._is_closed = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._unknown: dict[socket.socket, tuple[bytes, float]] = {}  # what it has said, until when it may say more
        listening.setblocking(False)
        self._woken, self._wake = socket.socketpair()
        for source in (listening, self._woken):
            self._selector.register(source, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="door", daemon=True)
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
                self._let_go(connection)

    def _accept(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError:  # it has gone again, or there are too many open files: the next may succeed
            self._is_closed.wait(0.01)
            return
        if len(self._unknown) >= _MOST_UNKNOWN:
            self._let_go(next(iter(self._unknown)))
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
            self._let_go(connection)
        else:
            self._unknown[connection] = (said, until)

    def _let_go(self, connection: socket.socket) -> None:
        if self._unknown.pop(connection, None) is not None:
            self._selector.unregister(connection)
        with contextlib.suppress(OSError):
            connection.close()


def _named(line: bytes) -> tuple[str, int, str] | None:
    """(run, node, host), None where it is not an `sft` that speaks."""
    message = parsed(line)
    if message is None or message.get("hello") != "sft":
        return None
    run, node, host = (message.get(key) for key in ("run", "node", "host"))
    if not isinstance(run, str) or not isinstance(host, str) or not isinstance(node, int) or isinstance(node, bool):
        return None
    return run, node, "".join(character if character.isprintable() else "?" for character in host[:255])
