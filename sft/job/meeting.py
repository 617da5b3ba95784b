"""Nodes of a run meet before any process starts: node 0 decides, the others wait, compare what they have, and start together.

The connections stay open while the run goes on: a node that is lost, or fails, ends the run on all nodes, with its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import queue
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from sft.engine.listen import listen
from tokenize_data.errors import UserError

PING_SECONDS, LOST_SECONDS = 2.0, 20.0
_RETRY_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What a node says of itself before the first collective."""

    node: int
    host: str
    processes: int
    free_gib: float
    facts: Mapping[str, str]  # what has to be the same everywhere: versions, hashes
    error: str | None = None  # why this node cannot take part

    @classmethod
    def of_this_node(cls, node: int, processes: int, facts: Mapping[str, str], error: str | None, folder: str) -> Ready:
        try:
            free = shutil.disk_usage(folder if os.path.isdir(folder) else ".").free / 2**30
        except OSError:
            free = 0.0
        return cls(node=node, host=platform.node(), processes=processes, free_gib=round(free, 1), facts=dict(facts), error=error)


class _Line:
    """Messages over one connection: JSON, a line each."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = b""
        self._lock = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout_seconds: float) -> dict[str, Any]:
        """Raises OSError (a timeout is one) where nothing comes, or the other end is gone."""
        self._connection.settimeout(timeout_seconds)
        while b"\n" not in self._buffer:
            part = self._connection.recv(65536)
            if not part:
                raise ConnectionError("the connection was closed")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class Host:
    """Node 0: listens from the beginning, so that the others know it is there while it prepares."""

    def __init__(self, address: str, port: int, nodes: int, say: Callable[[str], None]) -> None:
        self._nodes, self._say = nodes, say
        self._lines: dict[int, _Line] = {}
        self._hosts = {0: platform.node()}
        self._arrived: queue.Queue[tuple[int, str, _Line]] = queue.Queue()
        try:
            self._socket = listen(address, port, is_for_other_hosts=nodes > 1, backlog=nodes)
        except OSError as error:
            raise UserError(
                f"node 0 cannot listen on {address}:{port} ({_reason(error)}): "
                "give --addr an address of this host and --port a free one, the same on every node"
            ) from error
        threading.Thread(target=self._accept, name="meeting", daemon=True).start()

    def gather(self, decision: Mapping[str, Any], mine: Ready, timeout_seconds: float) -> list[Ready]:
        """Wait for all nodes, tell them the decision, and get what they say of themselves."""
        deadline = time.monotonic() + timeout_seconds
        while len(self._lines) < self._nodes - 1:
            missing = [node for node in range(1, self._nodes) if node not in self._lines]
            try:
                node, host, line = self._arrived.get(timeout=max(0.01, min(15.0, deadline - time.monotonic())))
            except queue.Empty:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"node {_listing(missing)} did not come within {timeout_seconds:.0f} s: start the same command there with --rank "
                        f"{missing[0]}, the same --addr and --port, and see that this host can be reached"
                    ) from None
                self._say(f"waiting for node {_listing(missing)}")
                continue
            if node in self._lines or not 0 < node < self._nodes:
                why = f"is taken by {self._hosts[node]}" if node in self._hosts else f"is none of 0 to {self._nodes - 1}"
                line.send({"stop": f"--rank {node} {why}: give each of the {self._nodes} nodes its own"})
                continue
            self._lines[node], self._hosts[node] = line, host
            self._say(f"node {node} is here: {host}")
        for line in self._lines.values():
            line.send({"decision": dict(decision)})
        return [mine, *(self._ready(node, deadline) for node in sorted(self._lines))]

    def answer(self, stop: str | None) -> None:
        for line in self._lines.values():
            with contextlib.suppress(OSError):
                line.send({"stop": stop} if stop else {"start": True})

    def _ready(self, node: int, deadline: float) -> Ready:
        try:
            message = self._lines[node].receive(max(1.0, deadline - time.monotonic()))
            return Ready(**message["ready"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"node {node} ({self._hosts[node]}) went away before the start ({error}): see what it says there") from error

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
                line = _Line(connection)
                hello = line.receive(10.0)
                self._arrived.put((int(hello["node"]), str(hello["host"]), line))
            except (KeyError, ValueError, AssertionError, TimeoutError):
                continue  # not one of us
            except OSError:
                return

    @contextlib.contextmanager
    def watching(self, lost: Callable[[str], None]) -> Iterator[None]:
        """While the run goes on: `lost` is called once, with what happened, when a node fails or is gone; the others are told."""
        stop = threading.Event()

        def tell(reason: str, but: int) -> None:
            if not stop.is_set():
                stop.set()
                for node, line in self._lines.items():
                    if node != but:
                        with contextlib.suppress(OSError):
                            line.send({"lost": reason})
                lost(reason)

        for node, line in self._lines.items():
            name, on_loss = f"node {node} ({self._hosts[node]})", partial(tell, but=node)
            threading.Thread(target=_watch, args=(line, name, stop, on_loss), daemon=True).start()
        try:
            yield
        finally:
            stop.set()
            for line in self._lines.values():
                with contextlib.suppress(OSError):
                    line.send({"bye": True})
            self.close()

    def farewell(self, reason: str) -> None:
        """This node has failed: the others need not wait to notice."""
        for line in self._lines.values():
            with contextlib.suppress(OSError):
                line.send({"lost": reason})

    def close(self) -> None:
        self._socket.close()
        for line in self._lines.values():
            line.close()


class Guest:
    """Another node: finds node 0, waits for its decision."""

    def __init__(self, address: str, port: int, node: int, timeout_seconds: float, say: Callable[[str], None]) -> None:
        self._name, self._node = f"node 0 at {address}:{port}", node
        deadline, told = time.monotonic() + timeout_seconds, 0.0
        while True:
            try:
                connection = socket.create_connection((address, port), timeout=5.0)
                break
            except socket.gaierror as error:
                raise UserError(f"--addr {address} is not known here ({error.strerror}): give node 0's name or address") from error
            except OSError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{self._name} did not answer within {timeout_seconds:.0f} s ({_reason(error)}): start the same command "
                        "there with --rank 0, check --addr and --port, and that no firewall is between"
                    ) from error
                if time.monotonic() - told > 30:
                    told = time.monotonic()
                    say(f"waiting for {self._name}")
                time.sleep(_RETRY_SECONDS)
        self._line = _Line(connection)
        self._line.send({"node": node, "host": platform.node()})

    def decision(self, timeout_seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
        """What node 0 has decided; it may be tokenising, or asking."""
        say(f"connected to {self._name}: waiting until it has prepared the data")
        message = self._receive(timeout_seconds)
        decision: dict[str, Any] = message["decision"]
        return decision

    def say_ready(self, ready: Ready, timeout_seconds: float) -> None:
        """Returns when the run starts."""
        self._line.send({"ready": {**vars(ready), "facts": dict(ready.facts)}})
        self._receive(timeout_seconds)

    def _receive(self, timeout_seconds: float) -> dict[str, Any]:
        try:
            message = self._line.receive(timeout_seconds)
        except OSError as error:
            raise UserError(f"{self._name} went away ({error}): see what it says there, then start this node again") from error
        if message.get("stop"):
            raise UserError(f"{self._name} stops: {message['stop']}")
        return message

    @contextlib.contextmanager
    def watching(self, lost: Callable[[str], None]) -> Iterator[None]:
        stop = threading.Event()
        thread = threading.Thread(target=_watch, args=(self._line, self._name, stop, lost), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            with contextlib.suppress(OSError):
                self._line.send({"bye": True})
            self._line.close()

    def farewell(self, reason: str) -> None:
        with contextlib.suppress(OSError):
            self._line.send({"lost": reason})


def _watch(line: _Line, name: str, stop: threading.Event, lost: Callable[[str], None]) -> None:
    """Ping, and listen for the other's pings: a host that lost its power closes no connection."""
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
                lost(f"{name} has not been heard of for {LOST_SECONDS:.0f} s: its host or the network is down")
                return
        except (OSError, ValueError):
            if not stop.is_set():
                lost(f"{name} is gone: its host or its `sft` ended")
            return


def differences(nodes: list[Ready]) -> list[str]:
    """One line for each node that cannot take part, or has something else than node 0."""
    lines = []
    first = nodes[0]
    for node in nodes:
        if node.error is not None:
            lines.append(f"node {node.node} ({node.host}): {node.error}")
            continue
        for name, value in node.facts.items():
            if first.facts.get(name) != value:
                lines.append(f"node {node.node} ({node.host}) has {name} {value}, node 0 ({first.host}) {first.facts.get(name)}")
    return lines


def table(nodes: list[Ready]) -> list[str]:
    """What came together."""
    rows = [("node", "host", "processes", "free disk"), *((str(n.node), n.host, str(n.processes), f"{n.free_gib:,.0f} GiB") for n in nodes)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def _listing(nodes: list[int]) -> str:
    return ", ".join(map(str, nodes))


def say_on_stderr(text: str) -> None:
    sys.stderr.write(f"sft train: {text}\n")
    sys.stderr.flush()
