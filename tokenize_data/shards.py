"""Writing shards: Arrow IPC files built from buffers, an index, and their checksums. A file is complete before the
manifest names it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tokenize_data.arrow_files import FileInfo, HashedFile, as_array, as_numpy
from tokenize_data.convert import Converted
from tokenize_data.index import Index

BATCH_DOCUMENTS = 1024
SHARD_BYTES = 256 << 20


class ShardWriter:
    """Writes converted chunks in order; `close` returns the files. File names start with `prefix`, unique to this
    build.
    """

    def __init__(self, folder: Path, prefix: str, id_type: np.dtype) -> None:
        self._folder, self._prefix = folder, prefix
        self._ids = pa.from_numpy_dtype(id_type)
        self._schema = pa.schema(
            {"ids": pa.list_(self._ids), "run_lengths": pa.list_(pa.uint32()), "run_roles": pa.list_(pa.uint8())}
        )
        self._carry: pa.RecordBatch | None = None
        self._file: HashedFile | None = None
        self._writer: Any = None
        self._documents = 0
        self._index = Index(folder)
        self.shards: list[FileInfo] = []

    def add(self, converted: Converted) -> None:
        if not len(converted.lengths):
            return
        c, source = converted, np.full(len(converted.lengths), converted.chunk.source)
        self._index.add({"length": c.lengths, "trained": c.trained, "cut": c.cut, "line": c.lines, "source": source})
        batch = self._batch(converted)
        if self._carry is not None:
            batch = pa.concat_batches([self._carry, batch])
        while len(batch) >= BATCH_DOCUMENTS:
            self._write(batch.slice(0, BATCH_DOCUMENTS))
            batch = batch.slice(BATCH_DOCUMENTS)
        self._carry = pa.concat_batches([batch]) if len(batch) else None

    def close(self) -> tuple[list[FileInfo], FileInfo]:
        """Returns (shards, index), all synced to disk."""
        if self._carry is not None:
            self._write(self._carry)
        self._finish_shard()
        return self.shards, self._index.write(f"{self._prefix}-index.arrow")

    def abandon(self) -> None:
        """Close the files without finishing them; the caller removes them."""
        self._index.close()
        if self._file is not None:
            self._file.abandon()

    def _batch(self, converted: Converted) -> pa.RecordBatch:
        ids = _lists(converted.lengths, converted.ids)
        run_lengths = _lists(converted.runs_per_document, np.array(converted.run_lengths, dtype=np.uint32))
        run_roles = _lists(converted.runs_per_document, np.array(converted.run_roles, dtype=np.uint8))
        return pa.record_batch([ids, run_lengths, run_roles], schema=self._schema)

    def _write(self, batch: pa.RecordBatch) -> None:
        if self._file is None:
            self._file = HashedFile(self._folder / f"{self._prefix}-{len(self.shards):05d}.arrow")
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


def _lists(lengths: list[int], values: np.ndarray) -> pa.ListArray:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.ListArray.from_arrays(as_array(offsets), as_array(values))


def _compact(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Copy a batch so that its offsets start at 0 over its own values, which lets readers slice it directly."""
    columns = []
    for column in batch.columns:
        offsets = as_numpy(column.offsets)
        values = column.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
        columns.append(pa.ListArray.from_arrays(as_array(offsets - offsets[0]), values))
    return pa.record_batch(columns, schema=batch.schema)
