"""Arrow files that are hashed while they are written, and numpy arrays over the same memory as Arrow's."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from tokenize_data.files import open_private


@dataclass(frozen=True)
class FileInfo:
    """A finished file: its name within the data set's folder, and what it must be when it is read."""

    file: str
    bytes: int
    sha256: str
    documents: int = 0


class HashedFile:
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
