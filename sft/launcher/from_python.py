"""Starts a run from Python: each worker is a separate process, and the reason for its end is returned."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from sft.config.settings import Settings
from sft.launcher import launch, processes
from sft.spec.run import RunSpec
from tokenize_data.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The exit code that `sft train` would have had, the run's folder, and the reason if it did not finish."""

    code: int
    folder: Path | None
    reason: str


@dataclass
class _Progress:
    """What becomes known while a run is started."""

    folder: Path | None = None
    reasons: list[str] = field(default_factory=list)


def fine_tune(settings: Settings) -> Ended:
    """Run these settings from data to model."""
    _refuse_other_launchers(settings)
    progress = _Progress()

    def decide(settings: Settings) -> RunSpec | int:
        with tempfile.TemporaryDirectory(prefix="sft-") as scratch:
            error_file = Path(scratch, "error")
            prepared = launch.prepare(settings, error_file)
            if isinstance(prepared, int):
                progress.reasons += [error_file.read_text()] if error_file.exists() else []
                return prepared
        progress.folder = prepared.folder
        return launch.accept(prepared)

    def start(spec: RunSpec, slot: processes.NodeSlot, end: processes.End | None) -> int:
        progress.folder = spec.folder
        return launch.start_workers(spec, slot, end, progress.reasons.append)

    code = launch.on_this_node(settings, decide, start)
    reason = progress.reasons[-1] if progress.reasons else f"it ended with exit code {code}: see its output"
    return Ended(code=code, folder=progress.folder, reason=reason)


def _refuse_other_launchers(settings: Settings) -> None:
    if settings.machine.hostfile is not None:
        raise UserError(
            f"--hostfile {settings.machine.hostfile} starts commands over ssh, which fine_tune() does not do: run "
            "`sft --hostfile ...`, or fine_tune() on each host with nodes, rank and addr"
        )
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        raise UserError(
            f"fine_tune() starts its own processes, and here RANK is {os.environ['RANK']} already: start the script "
            "with python, or give torchrun the command: torchrun -m sft ..."
        )
