"""One process builds a data set while others wait. The kernel releases the lock when its holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_LOOKS, _SECONDS_BETWEEN_LOOKS = 20, 0.05


@contextlib.contextmanager
def exclusive(path: Path, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold `path` as a lock, and remove the file afterwards. `on_wait` is called once with the name of another
    holder.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait(_holder(handle))
            fcntl.flock(handle, fcntl.LOCK_EX)
        if _is_current(handle, path):
            break
        os.close(handle)  # the previous holder removed the file: lock the new one
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        os.close(handle)


def _is_current(handle: int, path: Path) -> bool:
    try:
        return os.fstat(handle).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _holder(handle: int) -> str:
    for _ in range(_LOOKS):  # the holder writes its name just after locking
        try:
            holder = json.loads(os.pread(handle, 4096, 0))
            return f"process {holder['pid']} on {holder['host']}"
        except (ValueError, KeyError):
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    return "another process"
