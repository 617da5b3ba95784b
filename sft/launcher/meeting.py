"""The rendezvous of nodes before any worker starts. Node 0 resolves the run; the others wait, compare their facts and
start together. Connections stay open during the run: if a node fails or is lost, the attempt ends on all nodes,
with its name. Node 0 keeps listening, so that nodes or their replacements can return for another attempt.
"""

from __future__ import annotations

import contextlib
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

from sft.launcher.lines import Line, reason_of, watch
from sft.launcher.listen import listen
from sft.launcher.listener import Arrival, Listener, hello
from sft.launcher.preflight import Ready
from tokenize_data.errors import UserError

_RETRY_SECONDS, _TELL_SECONDS, _LOOK_SECONDS = 0.5, 15.0, 0.5
# The fields of node 0's decision and their types.
_DECISION: Mapping[str, type] = {
    "run": dict,
    "folder": str,
    "token": str,
    "restarts_left": int,
    "rank": int,
    "nodes": int,
}


class Coordinator:
    """Node 0. It listens from the start, so that the others find it while it prepares."""

    def __init__(self, address: str, port: int, nodes: int, run: str, say: Callable[[str], None]) -> None:
        self._nodes, self._run, self._say = nodes, run, say
        self._lines: dict[int, Line] = {}
        self._hosts = {0: platform.node()}
        try:
            listening = listen(address, port, is_for_other_hosts=nodes > 1)
        except (OSError, UnicodeError) as error:
            reason = reason_of(error) if isinstance(error, OSError) else str(error)
            raise UserError(
                f"node 0 cannot listen on {address}:{port} ({reason}): "
                "give --addr an address of this host and --port a free one, the same on every node"
            ) from error
        self._listener = Listener(listening)

    def collect(self, timeout_seconds: float) -> list[int]:
        """Wait for the other nodes until a deadline. Returns the numbers of those present."""
        deadline, told = time.monotonic() + timeout_seconds, time.monotonic()
        while True:
            self._remove_departed()
            with contextlib.suppress(queue.Empty):
                while True:
                    self._admit(self._listener.arrivals.get_nowait())
            missing = [node for node in range(1, self._nodes) if node not in self._lines]
            left = deadline - time.monotonic()
            if not missing or left <= 0:
                return sorted(self._lines)
            if time.monotonic() - told > _TELL_SECONDS:
                told = time.monotonic()
                self._say(f"waiting for node {_listing(missing)}")
            with contextlib.suppress(queue.Empty):
                self._admit(self._listener.arrivals.get(timeout=max(0.001, min(_LOOK_SECONDS, left))))

    def _admit(self, arrival: Arrival) -> None:
        """Accept a node, or tell it why it is rejected."""
        node, line = arrival.node, arrival.line
        if not line.is_waiting:
            line.close()
            return
        if arrival.run != self._run:
            why = (
                f"this is the rendezvous of --run_name {self._run}, not of {arrival.run}: give each run a --port of "
                "its own"
            )
        elif not 0 < node < self._nodes:
            why = f"--rank {node} is not between 0 and {self._nodes - 1}: give each of the {self._nodes} nodes its own"
        elif node in self._lines and self._lines[node].is_waiting:
            why = f"--rank {node} is taken by {self._hosts[node]}: give each of the {self._nodes} nodes its own"
        else:
            self._lines[node], self._hosts[node] = line, arrival.host
            self._say(f"node {node} has connected: {arrival.host}")
            return
        with contextlib.suppress(OSError):
            line.send({"stop": why})
        line.close()

    def _remove_departed(self) -> None:
        """Drop nodes that closed their connection, or that send data before the decision."""
        for node in [node for node, line in self._lines.items() if not line.is_waiting]:
            self._lines.pop(node).close()
            self._say(f"node {node} ({self._hosts.pop(node)}) left: waiting for a replacement")

    def agree(
        self, decision: Mapping[str, Any], chosen: Sequence[int], mine: Ready, timeout_seconds: float
    ) -> list[Ready]:
        """Send the decision and their numbers to the chosen nodes, and receive their reports. Dismiss the others."""
        deadline = time.monotonic() + timeout_seconds
        for node in [node for node in self._lines if node not in chosen]:
            with contextlib.suppress(OSError):
                self._lines[node].send(
                    {"stop": f"the run goes on with {len(chosen) + 1} nodes, and node {node} is not needed"}
                )
            self._lines.pop(node).close()
        for number, node in enumerate(chosen, start=1):
            with contextlib.suppress(OSError):  # a lost node is noticed below
                self._lines[node].send({"decision": {**decision, "rank": number, "nodes": len(chosen) + 1}})
        return [mine, *(self._ready(node, deadline) for node in chosen)]

    def answer(self, stop: str | None) -> None:
        for line in self._lines.values():
            with contextlib.suppress(OSError):
                line.send({"stop": stop} if stop else {"start": True})

    def _ready(self, node: int, deadline: float) -> Ready:
        try:
            message = self._lines[node].receive(max(1.0, deadline - time.monotonic()))
            ready = Ready.from_json(message.get("ready"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"node {node} ({self._hosts[node]}) disconnected before the start ({error}): see its output"
            ) from error
        return replace(ready, clock_offset=ready.clock - time.time())

    @contextlib.contextmanager
    def watching(self, lost: Callable[[str], None]) -> Iterator[None]:
        """Watch the nodes during a run. When one fails or is lost, `lost` is called once with the reason, and the
        others are told.
        """
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
            threading.Thread(target=watch, args=(line, name, stop, on_loss), daemon=True).start()
        try:
            yield
        finally:
            stop.set()
            for line in self._lines.values():
                with contextlib.suppress(OSError):
                    line.send({"bye": True})
            self._part()

    def disconnect(self, reason: str) -> None:
        """Tell the others that this node failed."""
        for line in self._lines.values():
            with contextlib.suppress(OSError):
                line.send({"lost": reason})

    def close(self) -> None:
        self._listener.close()
        self._part()

    def _part(self) -> None:
        """Receive from the nodes of this attempt."""
        for line in self._lines.values():
            line.close()
        self._lines, self._hosts = {}, {0: self._hosts[0]}


class Member:
    """Any other node. It finds node 0 and waits for its decision."""

    def __init__(
        self, address: str, port: int, node: int, run: str, timeout_seconds: float, say: Callable[[str], None]
    ) -> None:
        self._name = f"node 0 at {address}:{port}"
        deadline, told = time.monotonic() + timeout_seconds, 0.0
        while True:
            try:
                connection = socket.create_connection((address, port), timeout=5.0)
                break
            except (socket.gaierror, UnicodeError) as error:
                reason = reason_of(error) if isinstance(error, OSError) else str(error)
                raise UserError(
                    f"--addr {address} is not known here ({reason}): give node 0's name or address"
                ) from error
            except OSError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{self._name} did not answer within {timeout_seconds:.0f} s ({reason_of(error)}): start the "
                        "same command "
                        "there with --rank 0, check --addr and --port, and that no firewall is in between"
                    ) from error
                if time.monotonic() - told > 30:
                    told = time.monotonic()
                    say(f"waiting for {self._name}")
                time.sleep(_RETRY_SECONDS)
        self._line = Line(connection)
        with contextlib.suppress(OSError):  # a closed connection is noticed on receiving
            self._line.send(hello(run, node, platform.node()))

    def decision(self, timeout_seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
        """Wait for node 0's decision. Node 0 may be tokenising or asking the user."""
        say(f"connected to {self._name}: waiting until it has prepared the data")
        decision = self._receive(timeout_seconds).get("decision")
        if not isinstance(decision, dict) or any(
            type(decision.get(name)) is not kind for name, kind in _DECISION.items()
        ):
            raise UserError(
                f"{self._name} sent no decision that this `sft` understands: check --addr and --port, and "
                "install one version"
            )
        return decision

    def say_ready(self, ready: Ready, timeout_seconds: float) -> None:
        """Report that this node is ready. Returns when the run starts."""
        self._line.send({"ready": ready.as_json()})
        self._receive(timeout_seconds)

    def _receive(self, timeout_seconds: float) -> dict[str, Any]:
        try:
            message = self._line.receive(timeout_seconds)
        except OSError as error:
            raise UserError(
                f"{self._name} disconnected ({error}): see its output, check --addr and --port, then start this "
                "node again"
            ) from error
        if message.get("stop"):
            raise UserError(f"{self._name} stops: {message['stop']}")
        return message

    def close(self) -> None:
        self._line.close()

    @contextlib.contextmanager
    def watching(self, lost: Callable[[str], None]) -> Iterator[None]:
        stop = threading.Event()
        thread = threading.Thread(target=watch, args=(self._line, self._name, stop, lost), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            with contextlib.suppress(OSError):
                self._line.send({"bye": True})
            self._line.close()

    def disconnect(self, reason: str) -> None:
        with contextlib.suppress(OSError):
            self._line.send({"lost": reason})


def _listing(nodes: list[int]) -> str:
    return ", ".join(map(str, nodes))


def say_on_stderr(text: str) -> None:
    sys.stderr.write(f"sft train: {text}\n")
    sys.stderr.flush()
