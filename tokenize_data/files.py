"""Files with users' text: only their owner can read them, whatever the umask. And JSON for names that are not UTF-8."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import IO, Any

_MODE = 0o600
_SCRATCH_BUFFER = 1 << 16


def open_private(path: Path) -> IO[bytes]:
    """Open a new, empty file, replacing an old one; processes that have the old one open keep it."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return os.fdopen(_open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb")


def append_private(path: Path) -> IO[bytes]:
    """Open a file for appending and reading, after removing other users' access."""
    return os.fdopen(_open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "ab+")


def scratch_file(folder: Path) -> IO[bytes]:
    """A file for this process alone, gone when it is closed. Where files cannot be nameless, a killed run leaves one
    behind that the next run removes by its name.
    """
    return tempfile.TemporaryFile("w+b", _SCRATCH_BUFFER, prefix="part-", dir=folder)


def replace_private(path: Path, content: bytes, scratch: Path, sync: bool = False) -> None:
    """Replace a file atomically by way of `scratch`."""
    with open_private(scratch) as file:
        file.write(content)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(scratch, path)


def as_json(content: Any, indent: int | None = None) -> bytes:
    """UTF-8. A byte of a file name that is not UTF-8 becomes JSON's own escape, which reads as the same name."""
    return json.dumps(content, ensure_ascii=False, indent=indent).encode("utf-8", "backslashreplace")


def _open(path: Path, flags: int) -> int:
    handle = os.open(path, flags | os.O_CLOEXEC, _MODE)
    if os.fstat(handle).st_mode & 0o777 != _MODE:  # an old file, or a umask that removes our own permission
        with contextlib.suppress(PermissionError):  # another user's file, who decides who may read it
            os.fchmod(handle, _MODE)
    return handle
