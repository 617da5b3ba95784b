"""Writing shards: Arrow IPC files built from buffers, an index, and their checksums. A file is complete before the
manifest names it.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from tokenize_data.convert import Converted
from tokenize_data.files import open_private

BATCH_DOCUMENTS = 1024
SHARD_BYTES = 256 << 20


@dataclass(frozen=True)
class FileInfo:
    """A finished file: its name within the data set's folder, and what it must be when it is read."""

    file: str
    bytes: int
    sha256: str
    documents: int = 0


class _HashedFile:
    """What pyarrow writes to: hashes and counts as it goes, and is on disk when closed."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = open_private(path)
        self._hash = hashlib.sha256()
        self.bytes = 0
        self.closed = False

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._file.write(view)
        self._hash.update(view)
        self.bytes += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        if not self.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self.closed = True

    def abandon(self) -> None:
        self._file.close()
        self.closed = True

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


class ShardWriter:
    """Takes converted chunks in order; `close` gives the list of files. Files begin with `prefix`, unique to this
    build.
    """

    def __init__(self, folder: Path, prefix: str, id_type: np.dtype) -> None:
        self._folder, self._prefix = folder, prefix
        self._ids = pa.from_numpy_dtype(id_type)
        self._schema = pa.schema(
            {"ids": pa.list_(self._ids), "run_lengths": pa.list_(pa.uint32()), "run_roles": pa.list_(pa.uint8())}
        )
        self._carry: pa.RecordBatch | None = None
        self._file: _HashedFile | None = None
        self._writer: Any = None
        self._documents = 0
        self._index: dict[str, list[np.ndarray]] = {name: [] for name in ("length", "trained", "cut", "line", "source")}
        self.shards: list[FileInfo] = []

    def add(self, converted: Converted) -> None:
        if not converted.lengths:
            return
        c = converted
        for name, values in (("length", c.lengths), ("trained", c.trained), ("cut", c.cut), ("line", c.lines)):
            self._index[name].append(np.array(values, dtype=np.uint32))
        self._index["source"].append(np.full(len(converted.lengths), converted.chunk.source, dtype=np.uint16))
        batch = self._batch(converted)
        if self._carry is not None:
            batch = pa.concat_batches([self._carry, batch])
        while len(batch) >= BATCH_DOCUMENTS:
            self._write(batch.slice(0, BATCH_DOCUMENTS))
            batch = batch.slice(BATCH_DOCUMENTS)
        self._carry = pa.concat_batches([batch]) if len(batch) else None

    def close(self) -> tuple[list[FileInfo], FileInfo]:
        """(shards, index), all of them on disk."""
        if self._carry is not None:
            self._write(self._carry)
        self._finish_shard()
        columns = {key: np.concatenate(parts) for key, parts in self._index.items()}
        return self.shards, write_index(self._folder, f"{self._prefix}-index.arrow", columns)

    def abandon(self) -> None:
        """Let go of the open file; the caller removes what was written."""
        if self._file is not None:
            self._file.abandon()

    def _batch(self, converted: Converted) -> pa.RecordBatch:
        ids = _lists(converted.lengths, converted.ids)
        run_lengths = _lists(converted.runs_per_document, np.array(converted.run_lengths, dtype=np.uint32))
        run_roles = _lists(converted.runs_per_document, np.array(converted.run_roles, dtype=np.uint8))
        return pa.record_batch([ids, run_lengths, run_roles], schema=self._schema)

    def _write(self, batch: pa.RecordBatch) -> None:
        if self._file is None:
            self._file = _HashedFile(self._folder / f"{self._prefix}-{len(self.shards):05d}.arrow")
            self._writer = pa.ipc.new_file(self._file, self._schema)
        self._writer.write_batch(_compact(batch))
        self._documents += len(batch)
        if self._file.bytes >= SHARD_BYTES:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        self._writer.close()
        self._file.close()
        name = f"{self._prefix}-{len(self.shards):05d}.arrow"
        self.shards.append(FileInfo(name, self._file.bytes, self._file.sha256, self._documents))
        self._file, self._documents = None, 0


def write_index(folder: Path, name: str, columns: dict[str, np.ndarray]) -> FileInfo:
    """What is known of each document without opening its shard."""
    batch = pa.record_batch({key: as_array(values) for key, values in columns.items()})
    file = _HashedFile(folder / name)
    with pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    file.close()
    return FileInfo(name, file.bytes, file.sha256, len(batch))


def as_array(values: np.ndarray) -> Any:
    """numpy to Arrow over the same memory. pa.array would do, but imports pandas at first use, which takes a quarter of
    a second.
    """
    return pa.Array.from_buffers(
        pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(np.ascontiguousarray(values))]
    )


def as_numpy(array: Any) -> np.ndarray:
    """Arrow to numpy over the same memory; no nulls."""
    values = np.frombuffer(array.buffers()[1], dtype=array.type.to_pandas_dtype())
    return values[array.offset : array.offset + len(array)]


def _lists(lengths: list[int], values: np.ndarray) -> pa.ListArray:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.ListArray.from_arrays(as_array(offsets), as_array(values))


def _compact(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Offsets that begin at 0 over values of just this batch, so that a reader can take slices without a look at the
    parent.
    """
    columns = []
    for column in batch.columns:
        offsets = as_numpy(column.offsets)
        values = column.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
        columns.append(pa.ListArray.from_arrays(as_array(offsets - offsets[0]), values))
    return pa.record_batch(columns, schema=batch.schema)
