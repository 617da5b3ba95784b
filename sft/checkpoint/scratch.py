"""Hidden folders beside checkpoints: being written, being removed, or left by dead runs."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
from pathlib import Path

_SCRATCH = re.compile(r"\.(writing|removing|damaged)-step-\d+@(?P<host>.*)@(?P<pid>\d+)@[0-9a-f]+")


_STALE_SECONDS = 24 * 3600.0


def is_leftover(folder: Path) -> bool:
    """Whether a folder belongs to a dead process of this host, or to another host and is older than a day."""
    match = _SCRATCH.fullmatch(folder.name)
    if match is None or folder.is_symlink():
        return False
    if match[1] in ("removing", "damaged"):
        return True
    if match["host"] == socket.gethostname():
        return int(match["pid"]) == os.getpid() or not _is_alive(int(match["pid"]))
    with contextlib.suppress(FileNotFoundError):
        return abs(_now(folder) - folder.stat().st_mtime) > _STALE_SECONDS
    return False


def _now(folder: Path) -> float:
    """The time by the file system's clock, which may be another host's."""
    probe = folder.parent / f".clock-{os.getpid()}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def hidden_sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{kind}-{target.name}@{socket.gethostname()}@{os.getpid()}@{secrets.token_hex(4)}")
