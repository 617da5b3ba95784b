"""Reads a file's bytes: hashed, decompressed in pieces of bounded size, without a byte-order mark."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tokenize_data.errors import UserError

CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 16 << 20
BOM = b"\xef\xbb\xbf"
COMPRESSED = (".gz", ".zst")
_ZSTD_PIECE = 1 << 10  # four bytes of zstd may expand to 128 KiB, so this expands to at most 32 MiB


class Hashed:
    """A binary file that hashes and counts the bytes read from it."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self.sha256 = hashlib.sha256()
        self.count = 0

    def read(self, size: int = -1) -> bytes:
        data = self._raw.read(size)
        self.sha256.update(data)
        self.count += len(data)
        return data

    def readable(self) -> bool:
        return True

    @property
    def closed(self) -> bool:
        return self._raw.closed


def text_blocks(name: str, path: Path, raw: Hashed) -> Iterator[bytes]:
    """Yield the decompressed content in pieces of at most CHUNK_BYTES. `name` appears in errors."""
    is_first = True
    for block in _content(name, path, raw):
        for at in range(0, len(block), CHUNK_BYTES):
            piece = block[at : at + CHUNK_BYTES]
            if is_first:
                is_first = False
                if piece[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise UserError(f"{name} line 1: not UTF-8 but UTF-16: save the file as UTF-8")
                piece = piece.removeprefix(BOM)
            yield piece
    if raw.count == 0:
        raise UserError(f"{name} is empty: give a file with at least one row")


def first_line(name: str, path: Path, file: IO[bytes]) -> bytes:
    """The first line that is not empty, or the start of a very long one."""
    for block in text_blocks(name, path, Hashed(file)):
        if block := block.lstrip():
            return block.partition(b"\n")[0].rstrip()
    return b""


def _content(name: str, path: Path, raw: Hashed) -> Iterator[bytes]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".zst":
            yield from _zstd(name, raw)
            return
        stream: Any = gzip.GzipFile(fileobj=raw, mode="rb") if suffix == ".gz" else raw  # type: ignore[call-overload]
        while block := stream.read(CHUNK_BYTES):
            yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{name} is cut short or damaged ({error}): copy or compress it again") from error
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from error


def _zstd(name: str, raw: Hashed) -> Iterator[bytes]:
    import zstandard

    frame: Any = None
    parts: list[bytes] = []
    size = 0
    try:
        while block := raw.read(_ZSTD_PIECE):
            while block:
                if frame is None or frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                parts.append(frame.decompress(block))
                size += len(parts[-1])
                block = frame.unused_data if frame.eof else b""
            if size >= CHUNK_BYTES:
                yield b"".join(parts)
                parts, size = [], 0
    except zstandard.ZstdError as error:
        raise UserError(f"{name} is damaged ({error}): copy or compress it again") from error
    if frame is not None and not frame.eof:
        raise UserError(f"{name} is cut short (its last zstd frame has no end): copy or compress it again")
    yield b"".join(parts)
