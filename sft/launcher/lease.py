"""Allows one run at a time in a folder. A run holds a lease and renews it while it is alive."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenize_data import lock
from tokenize_data.errors import UserError

NAME = ".lease.json"
_KINDS: dict[str, Any] = {
    "host": str,
    "boot": str,
    "pid": int,
    "started": str | None,
    "renewed": float | int,
    "token": str,
}
_LATEST_SECONDS = 1e12  # since the epoch
RENEW_SECONDS, EXPIRY_SECONDS, WATCH_SECONDS = 10.0, 60.0, 25.0


@contextlib.contextmanager
def held(folder: Path, watch_seconds: float = WATCH_SECONDS) -> Iterator[None]:
    """Hold the lease of a folder. Raises UserError if another run is alive there; a dead run's lease is taken over."""
    folder.mkdir(parents=True, exist_ok=True)
    file, token = folder / NAME, secrets.token_hex(8)
    _take(file, token, watch_seconds)
    stop = threading.Event()
    renewing = threading.Thread(target=_renew, args=(file, token, stop), name="lease", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        stop.set()
        renewing.join()
        if (content := _read(file)) is not None and content.get("token") == token:
            with contextlib.suppress(OSError):  # a read-only folder must not hide why the run ended
                file.unlink()


def is_free(folder: Path, wait_seconds: float) -> bool:
    """Whether no run is alive in the folder, waiting up to `wait_seconds` for one to end."""
    deadline = time.monotonic() + wait_seconds
    while (content := _read(folder / NAME)) is not None and _sign_of_life(folder / NAME, content, 0.0) is not None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.2)
    return True


def _take(file: Path, token: str, watch_seconds: float) -> None:
    while not _created(file, token):
        content = _read(file)
        if content is None:  # released, half-written by a dead process, or damaged; a living holder rewrites it
            if file.exists() and _unchanged(file, 1.0 if _is_empty(file) else watch_seconds):
                _remove(file, None)
            continue
        reason = _sign_of_life(file, content, watch_seconds)
        if reason is not None:
            raise UserError(
                f"{file.parent} is being trained by process {content['pid']} on {content['host']}, {reason}: "
                "wait for it, stop it, or repeat the run beside it with --id NAME"
            )
        _remove(file, content["token"])


def _sign_of_life(file: Path, content: dict[str, Any], watch_seconds: float) -> str | None:
    """The evidence that the holder is alive; None if it is dead."""
    age = f"its lease is {max(0.0, time.time() - content['renewed']):.0f} s old"
    if content["host"] == platform.node() and content["boot"] == _boot():
        return age if _start_of(content["pid"]) == content["started"] else None
    if 0 <= _age(file) < EXPIRY_SECONDS:
        return age
    return (
        None if _unchanged(file, watch_seconds) else age
    )  # clocks of two hosts may differ, so only a missing renewal counts


def _created(file: Path, token: str) -> bool:
    """Create the lease atomically, so that only one of two processes succeeds: hard-link a finished file."""
    scratch = file.with_name(f"{NAME}.{token}")
    scratch.write_text(_content(token))
    try:
        os.link(scratch, file)
    except FileExistsError:
        return False
    finally:
        scratch.unlink(missing_ok=True)
    return True


def _renew(file: Path, token: str, stop: threading.Event) -> None:
    while not stop.wait(RENEW_SECONDS):
        if (content := _read(file)) is None or content.get("token") != token:
            return  # another run took over because this one seemed dead
        scratch = file.with_name(f"{NAME}.{token}")
        with contextlib.suppress(OSError):  # training continues on a full disk; the next renewal may succeed
            scratch.write_text(_content(token))
            os.replace(scratch, file)


def _remove(file: Path, token: str | None) -> None:
    """Remove a dead lease. Under a lock, look again: a lease that another process created meanwhile stays."""
    with lock.exclusive(file.with_name(f"{NAME}.lock"), lambda holder: None), contextlib.suppress(FileNotFoundError):
        content = _parsed(file.read_bytes())
        if (content and content["token"]) == token:
            file.unlink()


def _unchanged(file: Path, seconds: float) -> bool:
    before, deadline = _read(file), time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(1.0, seconds))
        if _read(file) != before:
            return False
    return True


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return _parsed(file.read_bytes())
    except OSError:
        return None


def _parsed(data: bytes) -> dict[str, Any] | None:
    """Parse a lease; None if it is incomplete or has values of the wrong type."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or not content.keys() >= _KINDS.keys():
        return None
    has_kinds = all(isinstance(content[name], kind) for name, kind in _KINDS.items())
    return content if has_kinds and 0 <= content["renewed"] < _LATEST_SECONDS else None


def _is_empty(file: Path) -> bool:
    with contextlib.suppress(OSError):
        return file.stat().st_size == 0
    return True


def _age(file: Path) -> float:
    try:
        return time.time() - file.stat().st_mtime
    except OSError:
        return 0.0


def _content(token: str) -> str:
    pid = os.getpid()
    facts = {
        "host": platform.node(),
        "boot": _boot(),
        "pid": pid,
        "started": _start_of(pid),
        "renewed": time.time(),
        "token": token,
    }
    return json.dumps(facts)


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _start_of(pid: int) -> str | None:
    """When a process started, since process ids are reused. None if it does not run (or is a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
