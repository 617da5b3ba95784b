"""Commits a checkpoint on all processes or none; lists checkpoints and removes old ones.

Files are written into a hidden folder. Once all processes have synced theirs, rank 0 writes the manifest, renames the
folder to `step-0000800` and points `latest` to it. Readers use the folders and their manifests; `latest` is for
people.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sft.checkpoint.fragments import Checkpoint
from sft.checkpoint.manifest import FileRecord, appears, damage, fsync_folder, iteration_of, step_name, write_manifest
from sft.checkpoint.scratch import hidden_sibling, is_leftover
from sft.spec.errors import CheckpointError
from tokenize_data.errors import UserError, shorten

LATEST = "latest"
_PATIENCE_SECONDS = 60.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Peers:
    """The processes that save together. `gather` returns all ranks' objects on every rank, and so is also a barrier."""

    rank: int
    size: int
    gather: Callable[[Any], list[Any]]


ALONE = Peers(rank=0, size=1, gather=lambda mine: [mine])


def peers_of(group: dist.ProcessGroup | None = None) -> Peers:
    """Peers over a CPU group, which needs gloo."""

    def gather(mine: Any) -> list[Any]:
        everyone: list[Any] = [None] * dist.get_world_size(group)
        try:
            dist.all_gather_object(everyone, mine, group=group)
        except RuntimeError as error:
            raise CheckpointError(
                f"another process does not respond ({shorten(error, 120)}): see why it ended, then resume"
            ) from error
        return everyone

    return Peers(rank=dist.get_rank(group), size=dist.get_world_size(group), gather=gather)


class PendingSave:
    """A checkpoint that a thread is writing. The constructor, `poll` and `finish` are collective calls of the main
    thread.
    """

    def __init__(
        self,
        root: Path,
        iteration: int,
        write: Callable[[Path], list[FileRecord]],
        content: Mapping[str, Any],
        peers: Peers,
    ) -> None:
        """`write` writes this process's files into a folder. `content` is the manifest's, without iteration and
        files.
        """
        self.target = root / step_name(iteration)
        self._iteration, self._write, self._content, self._peers = iteration, write, content, peers
        self._report: dict[str, Any] = {"host": socket.gethostname(), "error": None, "files": []}
        name, error = peers.gather(self._prepared() if peers.rank == 0 else None)[0]
        if error is not None:
            raise CheckpointError(_not_saved(iteration, error))
        self.scratch: Path | None = root / name if name else None  # None: committed, now or earlier, or failed
        self._thread: threading.Thread | None = None
        if self.scratch is not None:
            self._thread = threading.Thread(
                target=self._work, args=(self.scratch,), name=f"save {iteration}", daemon=True
            )
            self._thread.start()

    def poll(self) -> Path | None:
        """Like `finish` once every process has written its files; before that, return None at once."""
        if self.scratch is None:
            return self.target
        is_writing = self._thread is not None and self._thread.is_alive()
        return None if any(self._peers.gather(is_writing)) else self.finish()

    def finish(self) -> Path:
        """Wait until everything is on disk, then commit. If any process failed, all raise CheckpointError."""
        if self.scratch is None:
            return self.target
        if self._thread is not None:
            self._thread.join()
        scratch, self.scratch = self.scratch, None
        reports = self._peers.gather(self._report)
        error = _failures(reports)
        if self._peers.rank == 0:
            if error is None:
                error = self._committed(scratch, [file for report in reports for file in report["files"]])
            if error is not None:
                shutil.rmtree(scratch, ignore_errors=True)
        error = self._peers.gather(error)[0]
        if error is not None:
            raise CheckpointError(_not_saved(self._iteration, error))
        return self.target

    def _prepared(self) -> tuple[str | None, str | None]:
        """On rank 0: (name of the scratch folder, reason if there is none)."""
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            if self.target.exists() and (reason := damage(self.target)) is None:
                _log.info("%s exists and is complete: it stays as it is", self.target)
                return None, None
            elif self.target.exists():
                _log.warning("%s is damaged (%s): it is replaced", self.target, reason)
            scratch = hidden_sibling(self.target, "writing")
            scratch.mkdir()
        except OSError as error:
            return None, _one_failure(0, socket.gethostname(), _reason(error))
        return scratch.name, None

    def _work(self, scratch: Path) -> None:
        """The thread's work. Every failure must be reported, since the other processes wait."""
        try:
            if not appears(scratch, _PATIENCE_SECONDS):
                raise UserError(
                    f"{scratch} is not visible after {_PATIENCE_SECONDS:.0f} s: it must be on storage that all hosts "
                    "share"
                )
            self._report["files"] = self._write(scratch)
            fsync_folder(scratch)
        except Exception as error:
            self._report["error"] = _reason(error)

    def _committed(self, scratch: Path, files: list[FileRecord]) -> str | None:
        """Commit on rank 0. Returns the reason of a failure."""
        try:
            for record in files:
                if not appears(scratch / record["name"], _PATIENCE_SECONDS):
                    raise UserError(
                        f"{record['name']} is not visible here: the folder must be on storage that all hosts share"
                    )
            write_manifest(scratch, {**self._content, "iteration": self._iteration, "files": files})
            fsync_folder(scratch)
            if self.target.exists():
                os.rename(self.target, hidden_sibling(self.target, "damaged"))
            os.rename(scratch, self.target)
            fsync_folder(self.target.parent)
            _point_to(self.target)
        except (OSError, UserError, ValueError, TypeError) as error:
            return _one_failure(0, socket.gethostname(), _reason(error))
        return None


def find_latest(root: Path, verify: bool = True, peers: Peers = ALONE) -> tuple[Checkpoint | None, list[str]]:
    """Returns (newest complete checkpoint, skipped ones and why). With peers, a collective call in which each hashes a
    share of the files. None only if there is no checkpoint; if there are some but none is complete, that is an
    error.
    """
    names = peers.gather([folder.name for folder in step_folders(root)] if peers.rank == 0 else None)[0]
    skipped: list[str] = []
    for name in names:
        folder = root / name
        appears(folder, _PATIENCE_SECONDS)
        reasons = peers.gather(damage(folder, verify=verify, share=(peers.rank, peers.size)))
        reason = next((reason for reason in reasons if reason), None)
        if reason is None:
            return Checkpoint(folder), skipped
        skipped.append(f"{name} is not used: {reason}")
    if skipped:
        some = "; ".join(skipped[:3])
        raise UserError(f"no checkpoint in {root} is complete ({some}): restore one, or use a new folder")
    return None, []


def step_folders(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    if not root.is_dir():
        return []
    numbered = [(number, folder) for folder in root.iterdir() if (number := iteration_of(folder)) is not None]
    return [folder for _, folder in sorted(numbered, reverse=True)]


def prune(root: Path, keep: int, best: int | None = None, in_use: Path | None = None) -> list[Path]:
    """On rank 0: remove all but the newest `keep` checkpoints and the one of iteration `best`, and leftovers of dead
    runs. Returns what was removed. Damaged checkpoints do not count and are kept. `in_use` is the scratch folder of
    a running save.
    """
    assert keep >= 1, keep
    whole = [folder for folder in step_folders(root) if damage(folder, verify=False) is None]
    gone = [folder for folder in whole[keep:] if iteration_of(folder) != best]
    for folder in gone:
        hidden = hidden_sibling(folder, "removing")  # hide it first, so that nobody sees half a checkpoint
        os.rename(folder, hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    leftover = (
        [folder for folder in root.iterdir() if folder != in_use and is_leftover(folder)] if root.is_dir() else []
    )
    for folder in leftover:
        shutil.rmtree(folder, ignore_errors=True)
    return gone + leftover


def _point_to(target: Path) -> None:
    new = target.with_name(f".{LATEST}.part")  # the next save replaces leftovers
    with new.open("w") as file:
        file.write(f"{target.name}\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, target.with_name(LATEST))
    fsync_folder(target.parent)


def _failures(reports: list[dict[str, Any]]) -> str | None:
    failed = [
        _one_failure(rank, report["host"], report["error"]) for rank, report in enumerate(reports) if report["error"]
    ]
    more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
    return "; ".join(failed[:3]) + more if failed else None


def _one_failure(rank: int, host: str, reason: str) -> str:
    return f"rank {rank} on {host}: {reason}"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return shorten(error, 200) if isinstance(error, UserError) else f"{type(error).__name__}: {shorten(error, 200)}"


def _not_saved(iteration: int, reason: str) -> str:
    remedy = "free some space, or fix what it names; earlier checkpoints are untouched"
    return f"the checkpoint of iteration {iteration} was not saved ({reason}): {remedy}"
