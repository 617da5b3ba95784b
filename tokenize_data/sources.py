"""Reads files as chunks of JSON lines. Texts come from the file's bytes, and no copy is kept elsewhere."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, cast

from tokenize_data import folders, hub_data, remote
from tokenize_data.errors import UserError, shorten
from tokenize_data.folders import kind_of
from tokenize_data.rows import Row, Unreadable, arrow_rows, csv_rows, json_rows, too_long
from tokenize_data.streams import BOM, CHUNK_BYTES, COMPRESSED, MAX_LINE_BYTES, Hashed, first_line, text_blocks

_MOST_FILES = 1 << 16  # the index has 16 bits for the number of a source
_BATCH_ROWS = 128
_SEPARATORS = {"csv": ",", "tsv": "\t"}


@dataclass(frozen=True)
class Chunk:
    """Whole lines of one file; empty ones are not rows. `bad` are unreadable rows with their numbers."""

    source: int
    first_line: int
    data: bytes
    bytes_read: int
    bad: tuple[tuple[int, Unreadable], ...] = ()

    def rows(self) -> Iterator[tuple[int, Row]]:
        """All rows by number, without byte-order marks, which joined files have anywhere."""
        lines = (
            (number, line.removeprefix(BOM)) for number, line in enumerate(self.data.split(b"\n"), self.first_line)
        )
        rows: Iterator[tuple[int, Row]] = ((number, line) for number, line in lines if line and not line.isspace())
        return merge(self.bad, rows, key=itemgetter(0)) if self.bad else rows


@dataclass
class Source:
    """One file. Its `sha256`, `size` and times are known once it has been read completely."""

    name: str
    path: Path
    kind: str = "jsonl"
    size: int = 0
    sha256: str = ""
    mtime_ns: int = 0
    ctime_ns: int = 0
    is_remote: bool = False  # `path` is its local copy, or it has a `url`
    url: str | None = None
    stamp: str = ""  # for a url: changes when the file changes

    @property
    def unit(self) -> str:
        return "line" if self.kind == "jsonl" else "row"

    def place(self, number: int) -> str:
        return f"{self.name} {self.unit} {number}"

    def chunks(self, index: int) -> Iterator[Chunk]:
        """Yield the file's rows in chunks, which refer to it by `index`."""
        with self.open() as file:
            begun = self._identity(file)
            if self.kind in ("parquet", "arrow"):
                yield from _columns(self, index, file)
            else:
                yield from _text(self, index, file)
            if self._identity(file)[:2] != begun[:2]:
                raise UserError(f"{self.name} was changed while it was read: start again when it is finished")
            if self.url is None:
                self.size, self.mtime_ns, self.ctime_ns = (int(fact) for fact in begun)

    def open(self) -> BinaryIO:
        return self.path.open("rb") if self.url is None else remote.open_file(self.url)

    def _identity(self, file: BinaryIO) -> tuple[int | str, ...]:
        """The size, and what else changes with the content."""
        if self.url is not None:
            now = remote.describe(self.url)
            return now.size, now.stamp
        status = os.fstat(file.fileno())
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns


# ---- which files


def open_sources(names: Sequence[str]) -> list[Source]:
    """Open what `--data` names: files, folders with data, and data sets on the Hub."""
    sources = [source for name in names for source in _open(name)]
    if len(sources) > _MOST_FILES:
        raise UserError(f"{len(sources):,} files, more than {_MOST_FILES:,}: merge some of them")
    return sources


def _open(name: str) -> list[Source]:
    if remote.is_url(name):
        return [_open_url(file) for file in remote.files(name)]
    path = Path(name).expanduser()
    if path.is_dir():
        return [_open_file(str(file), file) for file in folders.files_of(name, path)]
    if path.exists():
        return [_open_file(name, path)]
    if hub_data.is_name(name) and not kind_of(path):
        return [_open_file(file.name, file.path, is_remote=True) for file in hub_data.files(name)]
    near = (
        sorted(file.name for file in path.parent.iterdir() if file.suffix == path.suffix)[:4]
        if path.parent.is_dir()
        else []
    )
    raise UserError(
        f"{name}: no such file"
        + (f"; {path.parent} has {', '.join(near)}" if near else ": check the path given to --data")
    )


def _open_url(file: remote.RemoteFile) -> Source:
    path = Path(file.url.partition("?")[0])
    kind = kind_of(path) or "jsonl"
    source = Source(file.url, path, kind, file.size, is_remote=True, url=file.url, stamp=file.stamp)
    return _checked(source)


def _open_file(name: str, path: Path, is_remote: bool = False) -> Source:
    if not path.is_file():
        raise UserError(f"{name} is not a regular file: give a JSONL file")
    try:
        size = path.stat().st_size
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}: check its permissions") from error
    source = Source(name, path, kind_of(path) or "jsonl", size, is_remote=is_remote)
    if is_remote and kind_of(path) is None:
        raise UserError(f"{name} is of a kind that is not read from the Hub: fetch it, and write it as JSONL")
    return _checked(source)


def _checked(source: Source) -> Source:
    if source.kind in ("parquet", "arrow") and source.path.suffix.lower() in COMPRESSED:
        raise UserError(f"{source.name} is a compressed {source.kind} file: decompress it first")
    if source.kind == "json":  # many .json files hold one object per line
        with source.open() as file:
            line = first_line(source.name, source.path, file)
        source.kind = "jsonl" if line.startswith(b"{") and line.endswith(b"}") else "json"
    return source


# ---- their rows


def _text(source: Source, index: int, file: BinaryIO) -> Iterator[Chunk]:
    raw = Hashed(file)
    blocks = text_blocks(source.name, source.path, raw)
    if source.kind == "jsonl":
        yield from _line_chunks(index, blocks, raw)
    else:
        rows = (
            json_rows(source.name, blocks)
            if source.kind == "json"
            else csv_rows(source.name, blocks, _SEPARATORS[source.kind])
        )
        yield from _row_chunks(source, index, rows, lambda _: raw.count)
    source.sha256 = raw.sha256.hexdigest()


def _line_chunks(index: int, blocks: Iterator[bytes], raw: Hashed) -> Iterator[Chunk]:
    rest, line, skipped = b"", 1, 0
    bad: list[tuple[int, Unreadable]] = []
    for block in blocks:
        if skipped:  # in a line that is too long: drop the rest of it
            cut = block.find(b"\n")
            if cut < 0:
                skipped += len(block)
                continue
            bad.append((line, too_long(skipped + cut)))
            line, skipped, block = line + 1, 0, block[cut + 1 :]
        cut = block.rfind(b"\n")
        if cut < 0:
            rest += block
            if len(rest) > MAX_LINE_BYTES:
                skipped, rest = len(rest), b""
            continue
        data, rest = rest + block[: cut + 1], block[cut + 1 :]
        yield Chunk(index, line, data, raw.count, tuple(bad))
        line += data.count(b"\n")
        bad = []
    if skipped:
        bad.append((line, too_long(skipped)))
    if rest or bad:
        yield Chunk(index, line, rest, raw.count, tuple(bad))


def _row_chunks(source: Source, index: int, rows: Iterator[Row], bytes_read: Callable[[int], int]) -> Iterator[Chunk]:
    lines: list[bytes] = []
    bad: list[tuple[int, Unreadable]] = []
    size, first, number = 0, 1, 0
    for number, row in enumerate(rows, 1):
        if isinstance(row, Unreadable):
            bad.append((number, row))
            size += len(row.raw)
            row = b""
        lines.append(row)
        size += len(row)
        if size >= CHUNK_BYTES:
            yield Chunk(index, first, b"\n".join(lines), bytes_read(number), tuple(bad))
            lines, bad, size, first = [], [], 0, number + 1
    if lines:
        yield Chunk(index, first, b"\n".join(lines), bytes_read(number), tuple(bad))
    if number == 0:
        raise UserError(f"{source.name} has no rows: give data with at least one row")


def _columns(source: Source, index: int, file: BinaryIO) -> Iterator[Chunk]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        opened: Any = parquet.ParquetFile(file, pre_buffer=False) if source.kind == "parquet" else _ArrowFile(file)
        names = opened.schema_arrow.names
        if twice := [column for column in names if names.count(column) > 1]:
            raise UserError(f"{source.name} has two columns named {twice[0]}: give each a name of its own")
        total = opened.metadata.num_rows if source.kind == "parquet" else 0
        size = source.size
        rows = arrow_rows(opened.iter_batches(_BATCH_ROWS))
        yield from _row_chunks(source, index, rows, lambda number: size * number // total if total else 0)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{source.name} cannot be read as {source.kind}: {shorten(error, 200)}: write it again"
        ) from error
    file.seek(0)
    source.sha256 = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


class _ArrowFile:
    """Arrow's two formats, with what of a Parquet file is used here."""

    def __init__(self, file: BinaryIO) -> None:
        import pyarrow as pa

        self._is_stream = file.read(6) != b"ARROW1"
        file.seek(0)
        self._reader: Any = pa.ipc.open_stream(file) if self._is_stream else pa.ipc.open_file(file)
        self.schema_arrow = self._reader.schema

    def iter_batches(self, batch_size: int) -> Iterator[Any]:
        numbers = range(0 if self._is_stream else self._reader.num_record_batches)
        for batch in self._reader if self._is_stream else map(self._reader.get_batch, numbers):
            for at in range(0, len(batch), batch_size):
                yield batch.slice(at, batch_size)
