"""Nodes of a run meet before any process starts: node 0 decides, the others wait, compare what they have, and start together.

The connections stay open while the run goes on: a node that is lost, or fails, ends the attempt on all nodes, with its name. Node 0 listens
until the end, so that for another attempt the others, or others in their place, come back to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from sft.engine.listen import listen
from sft.job.preflight import Ready
from tokenize_data.errors import UserError

PING_SECONDS, LOST_SECONDS = 2.0, 20.0
_RETRY_SECONDS, _TELL_SECONDS = 0.5, 15.0


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

    def collect(self, timeout_seconds: float) -> list[int]:
        """Wait for all the other nodes, but no longer than that. Returns the numbers of those that are here."""
        deadline = time.monotonic() + timeout_seconds
        while missing := [node for node in range(1, self._nodes) if node not in self._lines]:
            left = deadline - time.monotonic()
            try:
                node, host, line = self._arrived.get(timeout=max(0.01, min(_TELL_SECONDS, left)))
            except queue.Empty:
                if left <= 0:
                    break
                self._say(f"waiting for node {_listing(missing)}")
                continue
            if node in self._lines or not 0 < node < self._nodes:
                why = f"is taken by {self._hosts[node]}" if node in self._hosts else f"is none of 0 to {self._nodes - 1}"
                line.send({"stop": f"--rank {node} {why}: give each of the {self._nodes} nodes its own"})
                continue
            self._lines[node], self._hosts[node] = line, host
            self._say(f"node {node} is here: {host}")
        return sorted(self._lines)

    def agree(self, decision: Mapping[str, Any], chosen: Sequence[int], mine: Ready, timeout_seconds: float) -> list[Ready]:
        """Tell the chosen nodes the decision and their numbers, and get what they say of themselves. The others are sent away."""
        deadline = time.monotonic() + timeout_seconds
        for node in [node for node in self._lines if node not in chosen]:
            with contextlib.suppress(OSError):
                self._lines[node].send({"stop": f"the run goes on with {len(chosen) + 1} nodes, and node {node} would be one too many"})
            self._lines.pop(node).close()
        for number, node in enumerate(chosen, start=1):
            with contextlib.suppress(OSError):  # one that has gone is noticed below
                self._lines[node].send({"decision": {**decision, "rank": number, "nodes": len(chosen) + 1}})
        return [mine, *(self._ready(node, deadline) for node in chosen)]

    def answer(self, stop: str | None) -> None:
        for line in self._lines.values():
            with contextlib.suppress(OSError):
                line.send({"stop": stop} if stop else {"start": True})

    def _ready(self, node: int, deadline: float) -> Ready:
        try:
            message = self._lines[node].receive(max(1.0, deadline - time.monotonic()))
            ready = Ready(**message["ready"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"node {node} ({self._hosts[node]}) went away before the start ({error}): see what it says there") from error
        return replace(ready, clock_offset=ready.clock - time.time())

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
            self._part()

    def farewell(self, reason: str) -> None:
        """This node has failed: the others need not wait to notice."""
        for line in self._lines.values():
            with contextlib.suppress(OSError):
                line.send({"lost": reason})

    def close(self) -> None:
        self._socket.close()
        self._part()

    def _part(self) -> None:
        """From the nodes of this attempt."""
        for line in self._lines.values():
            line.close()
        self._lines, self._hosts = {}, {0: self._hosts[0]}


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
        self._line.send({"ready": ready.as_json()})
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


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def _listing(nodes: list[int]) -> str:
    return ", ".join(map(str, nodes))


def say_on_stderr(text: str) -> None:
    sys.stderr.write(f"sft train: {text}\n")
    sys.stderr.flush()
