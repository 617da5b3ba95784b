"""manifest.json, which marks a checkpoint as complete: its contents, its files with sizes and SHA-256, and its own
SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

from tokenize_data.errors import UserError, shorten

FORMAT = 1
MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{7,})")
_FILE = re.compile(r"rank-\d{5,}-of-\d{5,}(-\d+)?\.safetensors")
_KINDS: dict[str, type] = {
    "format": int,
    "iteration": int,
    "optimizer_step": int,
    "layout": dict,
    "states": list,
    "files": list,
    "facts": dict,
}
_MAX_BYTES = 64 * 2**20
_HASH_THREADS = 8


class FileRecord(TypedDict):
    """A file of a checkpoint."""

    name: str
    bytes: int
    sha256: str


def step_name(iteration: int) -> str:
    return f"step-{iteration:07d}"


def iteration_of(folder: Path) -> int | None:
    """The iteration in a folder's name; None if it is not a checkpoint's."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest and sync it to disk."""
    assert content.keys() == _KINDS.keys() - {"format"}, content.keys()
    with (folder / MANIFEST).open("wb") as file:
        file.write(_sealed({"format": FORMAT, **content}))
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a manifest and verify it. Raises UserError with the reason if it is invalid."""
    path = folder / MANIFEST
    try:
        if path.is_symlink() or path.stat().st_size > _MAX_BYTES:
            raise ValueError("a link or far too large")
        data = path.read_bytes()
        content = json.loads(data)
        version = content["format"]
        if version != FORMAT:
            raise ValueError(f"format {shorten(version)}, this version of sft reads {FORMAT}")
        digest = content.pop("sha256")
        if data != _sealed(content) or digest != _digest(content):
            raise ValueError("its own SHA-256 differs")
        _check(content)
    except FileNotFoundError:
        raise UserError(f"{folder} has no {MANIFEST}: it was not finished, take another checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({shorten(error, 120)}): take another checkpoint") from error
    if iteration_of(folder) not in (None, content["iteration"]):
        raise UserError(
            f"{path} is that of iteration {content['iteration']}: the folder mixes checkpoints; use another one"
        )
    return dict(content)


def damage(folder: Path, *, verify: bool = True, share: tuple[int, int] = (0, 1)) -> str | None:
    """Why a checkpoint is incomplete or damaged; None if it is intact. `share` (i, n): check only every n-th file,
    starting with file i.
    """
    if folder.is_symlink():
        return "it is a link"
    try:
        files: list[FileRecord] = read_manifest(folder)["files"]
    except UserError as error:
        return str(error)
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        found = pool.map(
            lambda record: _damage_of_file(folder / record["name"], record, verify), files[share[0] :: share[1]]
        )
        return next((reason for reason in found if reason), None)


def appears(path: Path, patience_seconds: float) -> bool:
    """Wait for a file: network file systems show other hosts' files late. Listing the folder refreshes them."""
    deadline = time.monotonic() + patience_seconds
    while not path.exists():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.2)
        if path.parent.is_dir():
            os.listdir(path.parent)
    return True


def fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _damage_of_file(path: Path, record: FileRecord, verify: bool) -> str | None:
    try:
        if path.is_symlink():
            return f"{path.name} is a link"
        size = path.stat().st_size
        if size != record["bytes"]:
            return f"{path.name} has {size} bytes instead of {record['bytes']}"
        if verify:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != record["sha256"]:
                    return f"{path.name} is not what was written: its SHA-256 differs"
    except OSError as error:
        return (
            f"{path.name} is missing"
            if isinstance(error, FileNotFoundError)
            else f"{path.name} cannot be read ({error.strerror})"
        )
    return None


def _check(content: Mapping[str, Any]) -> None:
    for key, kind in _KINDS.items():
        if type(content[key]) is not kind:
            raise ValueError(f"{key} is {shorten(content[key])}")
    names = [record["name"] for record in content["files"]]
    if len(set(names)) != len(names) or not all(_FILE.fullmatch(name) for name in names):
        raise ValueError("files of other names than sft gives")
    if not all(type(record.get("bytes")) is int and type(record.get("sha256")) is str for record in content["files"]):
        raise ValueError("files without a size or a SHA-256")


def _sealed(content: Mapping[str, Any]) -> bytes:
    return _dump({**content, "sha256": _digest(content)})


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dump(content)).hexdigest()


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
