"""A JSONL file that grows by whole lines and can be resumed: a key identifies each object."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from tokenize_data.errors import UserError, shorten
from tokenize_data.files import append_private, open_private, replace_private

Record = dict[str, Any]


class LineStore:
    """A file written by one process. A torn last line, left by a killed process, is removed."""

    def __init__(self, path: Path, key_of: Callable[[Record], str]) -> None:
        self.path, self._key_of = path, key_of
        self.records: dict[str, Record] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = append_private(path)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError as error:
            raise UserError(f"{path} is being written by another process: wait for it, or give another path") from error
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}: give another path") from error

    def __enter__(self) -> LineStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def add(self, record: Record) -> None:
        """Append a line and flush it to the operating system."""
        self.records[self._key_of(record)] = record
        try:
            self._file.write(as_line(record))
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror}: run the same command to resume"
            ) from error

    def replace(self, records: Iterable[Record]) -> None:
        """Replace the whole file atomically, in this order."""
        scratch = self.path.with_name(f".{self.path.name}.part")
        try:
            with open_private(scratch) as file:
                for record in records:
                    file.write(as_line(record))
            os.replace(scratch, self.path)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror}: check the folder and the free disk space"
            ) from error

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
        for number, line in enumerate(content[:whole].splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                self.records[self._key_of(record)] = record
            except (ValueError, KeyError, TypeError) as error:
                remedy = "remove it, or give another path"
                raise UserError(
                    f"{self.path} line {number} was not written by this command ({shorten(error)}): {remedy}"
                ) from error


def as_line(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def fingerprint(*parts: Any) -> str:
    """A short name for these values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_text(path: Path, text: str) -> None:
    """Write a file atomically."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_private(path, text.encode("utf-8", "backslashreplace"), path.with_name(f".{path.name}.part"))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}: give another path") from error


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Replace numbers that are not finite by null, which JSON requires."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value
