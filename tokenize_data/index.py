"""The index of a data set: what is known of each document without opening its shard.

Columns are kept on disk until the end, so memory does not grow with the number of documents. The file is one record
batch: each column of it is one stretch of the mapped file, whatever the size, and releases that read only the first
batch read all of it.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from tokenize_data.arrow_files import FileInfo, HashedFile, as_array
from tokenize_data.files import scratch_file

COLUMNS: tuple[tuple[str, type[np.unsignedinteger[Any]]], ...] = (
    ("length", np.uint32),
    ("trained", np.uint32),
    ("cut", np.uint32),
    ("line", np.uint32),
    ("source", np.uint16),
)


class Index:
    """Collects index rows in order in nameless scratch files; `write` makes the index file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with contextlib.ExitStack() as stack:
            self._files: dict[str, IO[bytes]] = {name: stack.enter_context(scratch_file(folder)) for name, _ in COLUMNS}
            self._open = stack.pop_all()

    def add(self, columns: Mapping[str, Sequence[int] | np.ndarray]) -> None:
        for name, kind in COLUMNS:
            self._files[name].write(np.ascontiguousarray(columns[name], dtype=kind).data)

    def write(self, name: str) -> FileInfo:
        """Write the index file and sync it to disk."""
        batch = pa.record_batch({column: as_array(self._mapped(column, kind)) for column, kind in COLUMNS})
        file = HashedFile(self._folder / name)
        with pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        file.close()
        self.close()
        return FileInfo(name, file.bytes, file.sha256, len(batch))

    def close(self) -> None:
        self._open.close()

    def _mapped(self, column: str, kind: type[np.unsignedinteger[Any]]) -> np.ndarray:
        file = self._files[column]
        file.flush()
        if not file.tell():
            return np.empty(0, kind)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), kind)
