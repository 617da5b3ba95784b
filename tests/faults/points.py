"""Faults at points of a process's progress: what is to happen, where, to whom. The process waits there, so nothing
depends on speed.

hooks/sitecustomize.py carries them out inside the commands under test, and says which points there are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.waiting import until

HOOKS = Path(__file__).with_name("hooks")
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Fault:
    """`point` is such as iteration:5, write:1 (the first save) or event:1200; `gate` a folder of its own.

    `who` is `main` (the command), `rank N`, `rank *`, or `run NAME` of a recipe NAME.yaml. `action` is hold, kill,
    stop, signal:SIGTERM,
    files:BYTES, memory:BYTES, readonly:FOLDER or clock:SECONDS.
    """

    point: str
    gate: Path
    who: str = "rank 0"
    action: str = "hold"

    def is_reached(self, by: str = "") -> bool:
        """`by` one process such as `1`, or by any of them."""
        return any(self.gate.glob(f"reached-{by or '*'}"))

    def pids(self) -> list[int]:
        return [int(file.read_text()) for file in sorted(self.gate.glob("reached-*")) if file.read_text()]

    def open(self) -> None:
        """Let go of those that wait here, and of those that come later."""
        (self.gate / "open").touch()

    def as_json(self) -> dict[str, Any]:
        point, _, number = self.point.partition(":")
        return {
            "point": point,
            "number": int(number or 1),
            "who": self.who,
            "action": self.action,
            "gate": str(self.gate),
        }


def environment(*faults: Fault, **further: str) -> dict[str, str]:
    """What a command that meets these faults finds in its environment."""
    for fault in faults:
        fault.gate.mkdir(parents=True, exist_ok=True)
    texts = json.dumps([fault.as_json() for fault in faults])
    return {"PYTHONPATH": f"{HOOKS}:{ROOT}", "SFT_TEST_FAULTS": texts, **further}


def wait_for(fault: Fault, process: Any, *, by: int = 1) -> bool:
    """Whether `by` processes have come to the point, or the command has ended before."""
    return until(lambda: len(fault.pids()) >= by or process.poll() is not None) and len(fault.pids()) >= by
