"""Messages between nodes: one JSON object per line, over an untrusted connection."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from tokenize_data.errors import shorten

PING_SECONDS, LOST_SECONDS = 2.0, 20.0
_SEND_SECONDS = 10.0
_LONGEST_LINE = 1 << 20


class Line:
    """One end of a connection. Whatever the peer does or sends, errors are OSErrors."""

    def __init__(self, connection: socket.socket, buffer: bytes = b"") -> None:
        """`buffer` holds bytes that were read already."""
        self._connection, self._buffer = connection, buffer
        self._lock = threading.Lock()
        connection.settimeout(_SEND_SECONDS)

    def send(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout_seconds: float) -> dict[str, Any]:
        """Receive a message. A timeout, a closed connection and an invalid line raise OSError."""
        deadline = time.monotonic() + timeout_seconds
        while b"\n" not in self._buffer:
            self._connection.settimeout(max(0.001, deadline - time.monotonic()))
            part = self._connection.recv(65536)
            if not part:
                raise ConnectionError("the connection was closed")
            self._buffer += part
            if len(self._buffer) > _LONGEST_LINE:
                raise ConnectionError(f"it sent a line of more than {_LONGEST_LINE:,} bytes, which `sft` never does")
        line, _, self._buffer = self._buffer.partition(b"\n")
        message = parsed(line)
        if message is None:
            raise ConnectionError(f"it sent {shorten(line.decode(errors='replace'), 60)}, which `sft` never does")
        return message

    @property
    def is_waiting(self) -> bool:
        """Whether the peer is connected and has sent nothing, as a node that waits for node 0 does."""
        self._connection.setblocking(False)
        try:
            self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return not self._buffer
        except OSError:
            return False
        finally:
            self._connection.settimeout(_SEND_SECONDS)
        return False

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def parsed(line: bytes) -> dict[str, Any] | None:
    """Parse a message; None if the line is invalid."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def watch(line: Line, name: str, stop: threading.Event, lost: Callable[[str], None]) -> None:
    """Send pings and expect the peer's: a host that loses power does not close its connections."""
    heard, pinged = time.monotonic(), 0.0
    while not stop.is_set():
        try:
            if time.monotonic() - pinged > PING_SECONDS:
                line.send({"ping": True})
                pinged = time.monotonic()
            message = line.receive(PING_SECONDS)
            heard = time.monotonic()
            if "bye" in message:
                return
            if "lost" in message:
                lost(str(message["lost"]))
                return
        except TimeoutError:
            if time.monotonic() - heard > LOST_SECONDS:
                lost(f"{name} has not been heard from for {LOST_SECONDS:.0f} s: its host or the network is down")
                return
        except OSError:
            if not stop.is_set():
                lost(f"{name} is gone: its host or its `sft` ended")
            return


def reason_of(error: OSError) -> str:
    """The operating system's text for an error."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
