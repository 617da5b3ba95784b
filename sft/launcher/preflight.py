"""The report of a node before the first collective, and the checks of all nodes' reports."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft.resolve.devices import visible
from tokenize_data.errors import shorten

_MOST_CLOCK_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A node's report about itself."""

    node: int
    host: str
    processes: int
    devices: str
    memory_gib: float  # free memory of the host
    disk_gib: float  # free disk space of the output folder
    clock: float  # seconds since the epoch, here
    facts: Mapping[str, str]  # what must be equal on all nodes: versions, hashes
    error: str | None = None  # why this node cannot take part
    clock_offset: float = 0.0  # difference to node 0's clock, as node 0 measures it

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "facts": dict(self.facts)}

    @classmethod
    def from_json(cls, content: Any) -> Ready:
        """Parse a report. Raises ValueError if it is invalid: another version, or not a node."""
        kinds: dict[str, Any] = {
            "node": int,
            "host": str,
            "processes": int,
            "devices": str,
            "memory_gib": float | int,
            "disk_gib": float | int,
            "clock": float | int,
            "facts": dict,
            "error": str | None,
            "clock_offset": float | int,
        }
        if not isinstance(content, dict) or content.keys() != kinds.keys():
            raise ValueError("its report has other fields than this `sft` expects")
        for name, kind in kinds.items():
            if not isinstance(content[name], kind):
                raise ValueError(f"its {name} is {shorten(content[name])}")
        return cls(**content)


def ready(node: int, processes: int, facts: Mapping[str, str], error: str | None, folder: Path) -> Ready:
    """Report on this node. The output `folder` must be writable here."""
    return Ready(
        node=node,
        host=platform.node(),
        processes=processes,
        devices=_devices(),
        memory_gib=_free_memory(),
        disk_gib=_free_disk(folder),
        clock=time.time(),
        facts=dict(facts),
        error=error or _not_writable(folder),
    )


def differences(nodes: Sequence[Ready]) -> list[str]:
    """One line for each reason why a node cannot take part, and for each difference from node 0."""
    lines = []
    first = nodes[0]
    for node in nodes:
        name = f"node {node.node} ({node.host})"
        if node.error is not None:
            lines.append(f"{name}: {node.error}")
            continue
        for what, value in node.facts.items():
            if first.facts.get(what) != value:
                lines.append(f"{name} has {what} {value}, node 0 ({first.host}) {first.facts.get(what)}")
        if abs(node.clock_offset) > _MOST_CLOCK_SECONDS:
            way = "ahead of" if node.clock_offset > 0 else "behind"
            lines.append(f"the clock of {name} is {abs(node.clock_offset):,.0f} s {way} node 0's: set both by NTP")
    return lines


def table(nodes: Sequence[Ready]) -> list[str]:
    """A table of the nodes, one line each, followed by what they have in common."""
    rows = [("node", "host", "processes", "devices", "free memory", "free disk", "clock")]
    for one in nodes:
        sizes = (f"{one.memory_gib:,.0f} GiB", f"{one.disk_gib:,.0f} GiB")
        rows.append((str(one.node), one.host, str(one.processes), one.devices, *sizes, f"{one.clock_offset:+.1f} s"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    common = [
        f"{what} {value}"
        for what, value in nodes[0].facts.items()
        if all(node.facts.get(what) == value for node in nodes)
    ]
    return [*lines, f"the same on all: {', '.join(common)}"]


def _devices() -> str:
    names = [device.name for device in visible()]
    if not names:
        return f"{len(os.sched_getaffinity(0))} CPU cores"
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _free_memory() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable:")), 0.0)


def _free_disk(folder: Path) -> float:
    place = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    return shutil.disk_usage(place).free / 2**30


def _not_writable(folder: Path) -> str | None:
    probe = folder / f".writable-{secrets.token_hex(6)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        return f"cannot write to {folder} ({error.strerror}): checkpoints are written by every node"
    return None
