"""Files to chunks of JSON lines. JSONL (plain, .gz, .zst) is read as bytes; everything else comes through `datasets` as JSON lines."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tokenize_data.errors import UserError

CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 16 << 20
_JSONL_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".ndjson.gz", ".ndjson.zst", ".gz", ".zst")
_LOADERS = {".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Chunk:
    """Whole lines of one file. `too_long` are lines (numbers and sizes) that were skipped because nobody writes rows of that size."""

    source: int
    first_line: int
    data: bytes
    bytes_read: int
    too_long: tuple[tuple[int, int], ...] = ()


@dataclass
class Source:
    """One file, folder or Hub data set. `sha256` and `size` are known once all of it has been read."""

    name: str
    unit: str = "line"
    size: int = 0
    sha256: str = ""
    _loader: str | None = field(default=None, repr=False)
    _rows: Any = field(default=None, repr=False)

    def place(self, number: int) -> str:
        return f"{self.name} {self.unit} {number}"

    def chunks(self, index: int) -> Iterator[Chunk]:
        if self._loader is None:
            yield from _jsonl_chunks(self, index)
        else:
            yield from _dataset_chunks(self, index, self._loader)


def open_source(name: str) -> Source:
    """What `name` means: a file that exists, a folder with data, or a data set on the Hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return Source(name, unit="row", _loader="disk")
        if any(file.name.endswith((*_JSONL_SUFFIXES, *_LOADERS)) for file in path.iterdir()):
            return Source(name, unit="row", _loader="folder")
        raise UserError(f"{name} is a directory without data files: give JSONL files, or a folder that save_to_disk wrote")
    if path.exists():
        if not path.is_file():
            raise UserError(f"{name} is not a regular file: give a JSONL file")
        try:
            size = path.stat().st_size
            path.open("rb").close()
        except OSError as error:
            raise UserError(f"{name} cannot be read: {error.strerror}: check its permissions") from error
        loader = None if _is_json_lines(path) else _LOADERS.get(path.suffix.lower())
        return Source(name, unit="row" if loader else "line", size=size, _loader=loader)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+){0,2}", name) and not name.lower().endswith((*_JSONL_SUFFIXES, *_LOADERS)):
        return Source(name, unit="row", _loader="hub")
    near = sorted(file.name for file in path.parent.iterdir() if file.suffix == path.suffix)[:4] if path.parent.is_dir() else []
    raise UserError(f"{name}: no such file" + (f"; {path.parent} has {', '.join(near)}" if near else ": check the path given to --data"))


def _is_json_lines(path: Path) -> bool:
    """A .json file that holds one object a line, as many people's do."""
    if path.suffix.lower() != ".json":
        return False
    with path.open("rb") as file:
        line = file.readline(CHUNK_BYTES).removeprefix(_BOM).strip()
    return line.startswith(b"{") and line.endswith(b"}")


# ---- JSONL


class _Hashed:
    """A binary file that hashes and counts what is read from it."""

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


def _blocks(source: Source, raw: _Hashed) -> Iterator[bytes]:
    """The file's content, decompressed, in pieces."""
    try:
        if source.name.endswith(".zst"):
            yield from _zstd_blocks(source, raw)
            return
        stream: Any = gzip.GzipFile(fileobj=raw, mode="rb") if source.name.endswith(".gz") else raw  # type: ignore[call-overload]
        while block := stream.read(CHUNK_BYTES):
            yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{source.name} is cut short or damaged ({error}): copy or compress it again") from error
    except OSError as error:
        raise UserError(f"{source.name} cannot be read: {error.strerror or error}") from error


def _zstd_blocks(source: Source, raw: _Hashed) -> Iterator[bytes]:
    import zstandard

    frame = None
    try:
        while block := raw.read(CHUNK_BYTES // 16):
            while block:
                if frame is None or frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise UserError(f"{source.name} is damaged ({error}): copy or compress it again") from error
    if frame is not None and not frame.eof:
        raise UserError(f"{source.name} is cut short (its last zstd frame has no end): copy or compress it again")


def _jsonl_chunks(source: Source, index: int) -> Iterator[Chunk]:
    with open(Path(source.name).expanduser(), "rb") as file:
        raw = _Hashed(file)
        rest, line, skipped = b"", 1, 0
        too_long: list[tuple[int, int]] = []
        first = True
        for block in _blocks(source, raw):
            if first:
                first = False
                block = block.removeprefix(_BOM)
                if block[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise UserError(f"{source.name} line 1: not UTF-8 but UTF-16: save the file as UTF-8")
            if skipped:  # inside a line that is too long: drop up to its end
                cut = block.find(b"\n")
                if cut < 0:
                    skipped += len(block)
                    continue
                too_long.append((line, skipped + cut))
                line, skipped, block = line + 1, 0, block[cut + 1 :]
            cut = block.rfind(b"\n")
            if cut < 0:
                rest += block
                if len(rest) > MAX_LINE_BYTES:
                    skipped, rest = len(rest), b""
                continue
            data, rest = rest + block[: cut + 1], block[cut + 1 :]
            yield Chunk(index, line, data, raw.count, tuple(too_long))
            line += data.count(b"\n")
            too_long = []
        if skipped:
            too_long.append((line, skipped))
        if rest or too_long:
            yield Chunk(index, line, rest, raw.count, tuple(too_long))
        if raw.count == 0:
            raise UserError(f"{source.name} is empty: give a file with at least one row")
        source.size, source.sha256 = raw.count, raw.sha256.hexdigest()


# ---- through `datasets`


def _dataset_chunks(source: Source, index: int, loader: str) -> Iterator[Chunk]:
    if source._rows is None:
        source._rows = _load(source, loader)
    rows = source._rows
    digest = hashlib.sha256()
    lines: list[bytes] = []
    length, first, number = 0, 1, 0
    total = max(len(rows), 1)
    for number, row in enumerate(rows, 1):
        line = json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
        digest.update(line)
        lines.append(line)
        length += len(line)
        if length >= CHUNK_BYTES:
            yield Chunk(index, first, b"\n".join(lines), source.size * number // total)
            lines, length, first = [], 0, number + 1
    if lines:
        yield Chunk(index, first, b"\n".join(lines), source.size)
    if number == 0:
        raise UserError(f"{source.name} has no rows: give data with at least one row")
    source.sha256 = digest.hexdigest()


def _load(source: Source, loader: str) -> Any:
    import datasets  # slow to import, and only needed for what is not JSONL

    datasets.disable_progress_bars()
    for name in ("datasets", "huggingface_hub"):  # what goes wrong is said below, once
        logging.getLogger(name).setLevel(logging.CRITICAL)
    name = str(Path(source.name).expanduser())
    try:
        if loader == "disk":
            return _only_split(source, datasets.load_from_disk(name))
        if loader == "folder":
            return _only_split(source, datasets.load_dataset(name))
        if loader == "hub":
            repository, *rest = source.name.split(":")
            data = datasets.load_dataset(repository, rest[0] if len(rest) == 2 else None)
            return data[rest[-1]] if rest else _only_split(source, data)
        options = {"sep": "\t"} if name.endswith(".tsv") else {}
        return datasets.load_dataset(loader, data_files=name, split="train", **options)
    except UserError:
        raise
    except Exception as error:  # datasets raises dozens of kinds
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(f"{source.name} cannot be read as {loader} by datasets: {type(error).__name__}: {reason}") from error


def _only_split(source: Source, data: Any) -> Any:
    if not hasattr(data, "keys"):
        return data
    if "train" in data:
        return data["train"]
    if len(data) == 1:
        return next(iter(data.values()))
    raise UserError(f"{source.name} has the splits {', '.join(data)}: name one as {source.name}:SPLIT")
