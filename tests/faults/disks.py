"""Full disks: a limit on the size of files that comes and goes, and a tiny file system. The last good checkpoint stays
the latest.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

from sft.checkpoint.commit import find_latest
from tests.faults.rows import RUN, TWO, Field, Row, finish, iterations_done, newest_step, run, start, workers_of
from tests.faults.waiting import until

NO_ROOM = 1_000_000  # bytes: room for metrics, not for a checkpoint
TINY = ("46m", "32m")  # room for a checkpoint and the model; for a checkpoint alone


def limited_files(field: Field) -> Row:
    """One rank may write no large files for a while: its saves fail on all ranks, training goes on, later saves
    succeed.
    """
    row = Row("full disk: RLIMIT_FSIZE of one rank")
    for rank in (1,) if field.small else (1, 0):
        row.count(f"rank {rank}", _limited(field, rank))
    return row


def _limited(field: Field, rank: int) -> str | None:
    name = f"limited{rank}"
    folder = field.site.root / "checkpoints" / f"{RUN}-{name}"
    process = start(field.site, "--id", name, "--iters", 1_000_000, *TWO)
    if not until(lambda: newest_step(folder) > 0 or process.poll() is not None) or process.poll() is not None:
        return finish(process)[2]
    pid = workers_of(process.pid)[rank]
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (NO_ROOM, hard))
    done = iterations_done(field.site, name)
    until(
        lambda: iterations_done(field.site, name) >= done + 4 or process.poll() is not None
    )  # one that was under way is through
    kept, done = newest_step(folder), iterations_done(field.site, name)
    until(lambda: iterations_done(field.site, name) >= done + 8 or process.poll() is not None)
    stayed, is_alive = newest_step(folder) == kept, process.poll() is None
    if is_alive:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
        recovered = until(lambda: newest_step(folder) > kept or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
    code, said, errors = finish(process)
    told = said + errors
    if not is_alive or code != 75:
        return f"exit code {code}: {errors[-300:]}"
    if not stayed or not recovered:
        return f"step {kept} was {'' if stayed else 'not '}kept, later ones {'' if recovered else 'not '}saved"
    if f"was not saved (rank {rank} on " not in told or "File too large" not in told:
        return f"rank and reason are not named: {told[-300:]}"
    return None


def tiny_disks(field: Field) -> Row:
    row = Row("full disk: tiny tmpfs")
    for size in TINY[: 1 if field.small else None]:
        folder = field.folder(f"disk-{size}")
        reason = _mount(folder, size)
        if reason is not None:
            row.note = f"skipped: {reason}"
            return row
        try:
            row.count(size, _on_tiny_disk(field, folder))
        finally:
            subprocess.run(["umount", folder], check=False)
    return row


def _mount(folder: Path, size: str) -> str | None:
    """Why it could not be."""
    if os.geteuid() or shutil.which("mount") is None:
        return "mounting needs root"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    return " ".join(done.stderr.split()) or None if done.returncode else None


def _on_tiny_disk(field: Field, disk: Path) -> str | None:
    """Training goes on, or ends with a line that says why; with more room it goes on from the checkpoint that was
    whole.
    """
    flags = ["--save_checkpoint_dir", disk, "--iters", 7, "--save_interval", 2, "--id", "tiny"]
    code, said, errors = run(field.site, *flags)
    told = said + errors
    found, _ = find_latest(disk / f"{RUN}-tiny")
    if found is None or found.iteration != 2:
        return f"the newest checkpoint is {found and found.folder}"
    if "was not saved (rank 0 on " not in told or "No space left on device" not in told:
        return f"rank and reason are not named: {told[-300:]}"
    last = (errors.splitlines() or [""])[-1]
    if code not in (0, 2, 3) or (code and not (last.startswith("sft train: ") and "No space left on device" in last)):
        return f"exit code {code}: {errors[-300:]}"
    if code:
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        code, said, errors = run(field.site, *flags)
        if code or "resumed after iteration 2," not in said:
            return f"with more room: exit code {code}: {errors[-300:]}"
    return None
