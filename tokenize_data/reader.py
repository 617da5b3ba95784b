"""Reads a tokenised data set, memory-mapped: documents are slices without a copy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tokenize_data import manifest as manifests
from tokenize_data.arrow_files import FileInfo, as_numpy
from tokenize_data.dataset import QUESTION
from tokenize_data.errors import UserError
from tokenize_data.rendered import ASSISTANT


@dataclass(frozen=True)
class Document:
    """Token ids and runs of roles, all views of the mapped file."""

    ids: np.ndarray
    run_lengths: np.ndarray
    run_roles: np.ndarray

    def roles(self) -> np.ndarray:
        """The role of each token."""
        roles: np.ndarray = np.repeat(self.run_roles, self.run_lengths)
        return roles

    def trained(self) -> np.ndarray:
        """1 for each trained token, if only answers are trained. A document's first token is never predicted."""
        trained: np.ndarray = (self.roles() == ASSISTANT).astype(np.uint8)
        trained[:1] = 0
        return trained


class ShardReader:
    """A finished data set. Opening checks that every file exists with its size; `verify` reads all files and checks
    SHA-256.
    """

    def __init__(self, folder: Path, verify: bool = False) -> None:
        manifest = manifests.read(folder)
        if manifest is None:
            state = (
                "has no manifest.json, so its tokenisation was never finished" if folder.is_dir() else "does not exist"
            )
            raise UserError(
                f"{folder} {state}: make it with tokenize_data --run_name {folder.name} --data FILES --checkpoint C"
            )
        self._open_all(folder, manifest)
        if verify:
            self.verify()

    @classmethod
    def of(cls, folder: Path, manifest: manifests.Manifest) -> ShardReader:
        """A reader for a manifest that is not written yet."""
        reader = cls.__new__(cls)
        reader._open_all(folder, manifest)
        return reader

    def _open_all(self, folder: Path, manifest: manifests.Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        for info in manifest.all_files():
            _check_size(folder, info)
        self._first = np.concatenate([[0], np.cumsum([shard.documents for shard in manifest.shards])])
        self._files: list[Any] = [None] * len(manifest.shards)
        self._batches: dict[tuple[int, int], tuple[np.ndarray, ...]] = {}

    def keep_open(self) -> ShardReader:
        """Map all files now, so that this data set stays readable even if it is replaced meanwhile."""
        self._files = [self._open(info) for info in self.manifest.shards]
        _ = self.index
        return self

    def __len__(self) -> int:
        return self.manifest.documents

    def __getitem__(self, number: int) -> Document:
        if not -len(self) <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}")
        number %= len(self)
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        batch, row = divmod(number - int(self._first[shard]), self.manifest.batch_documents)
        columns = self._batches.get((shard, batch))
        if columns is None:
            columns = self._batches[(shard, batch)] = self._open_batch(shard, batch)
        ids, id_offsets, lengths, roles, run_offsets = columns
        runs = slice(run_offsets[row], run_offsets[row + 1])
        return Document(ids[id_offsets[row] : id_offsets[row + 1]], lengths[runs], roles[runs])

    def __iter__(self) -> Iterator[Document]:
        return (self[number] for number in range(len(self)))

    @cached_property
    def index(self) -> dict[str, np.ndarray]:
        """The index columns: length, trained, cut, line, source."""
        info = self.manifest.index
        batch = self._open(info).get_batch(0)
        if len(batch) != self.manifest.documents:
            raise UserError(
                f"{self.folder / info.file} lists {len(batch):,} documents, the manifest {self.manifest.documents:,}"
            )
        return {name: as_numpy(batch.column(name)) for name in batch.schema.names}

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each document."""
        return self.index["length"]

    @property
    def trained(self) -> np.ndarray:
        """The number of trained tokens of each document."""
        return self.index["trained"]

    @property
    def cut(self) -> np.ndarray:
        """The number of tokens cut off each document, or taken out of its question."""
        return self.index["cut"]

    @cached_property
    def cut_at_right(self) -> np.ndarray:
        """The number of tokens cut off each document's end, which may belong to its answer."""
        if not self.manifest.num_shortened:
            return self.cut
        datasets = self.manifest.datasets
        shortens = [(dataset.get("reading") or {}).get("truncate") == QUESTION for dataset in datasets]
        of_source = np.repeat(shortens, [len(dataset["files"]) for dataset in datasets])
        found: np.ndarray = np.where(of_source.take(self.index["source"], mode="clip"), 0, self.cut)
        return found

    @cached_property
    def parts(self) -> dict[str, range]:
        """The range of documents of each data set, by name."""
        found: dict[str, range] = {}
        source, first = 0, 0
        for place, dataset in enumerate(self.manifest.datasets, 1):
            source += len(dataset["files"])
            last = int(np.searchsorted(self.index["source"], source))
            name = dataset.get("name") or f"data set {place}"
            found[name if name not in found else f"{name} {place}"] = range(first, last)
            first = last
        return found

    def rows_of(self, documents: slice) -> np.ndarray:
        """A number for the row of each of these documents, equal for copies and for several turns of one row."""
        source, line = (self.index[name][documents].astype(np.int64) for name in ("source", "line"))
        found: np.ndarray = source << 32 | line
        return found

    @cached_property
    def _names(self) -> list[str]:
        return [file["name"] for dataset in self.manifest.datasets for file in dataset["files"]]

    def place(self, number: int) -> tuple[str, int]:
        """The (file, line or row) of a document."""
        source = int(self.index["source"][number])
        if source >= len(self._names):
            raise UserError(
                f"{self.folder / manifests.NAME} has been edited: it names {len(self._names)} files: tokenise again "
                "with --retokenize"
            )
        return self._names[source], int(self.index["line"][number])

    def place_text(self, number: int) -> str:
        """train.jsonl line 12."""
        file, line = self.place(number)
        return f"{Path(file).name} {'line' if '.jsonl' in file else 'row'} {line}"

    def verify(self) -> None:
        """Read every file and compare its SHA-256."""
        for info in self.manifest.all_files():
            with (self.folder / info.file).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != info.sha256:
                raise UserError(
                    f"{self.folder / info.file} is damaged: its SHA-256 is {found[:16]}…, the manifest says "
                    f"{info.sha256[:16]}…: "
                    "tokenise again with --retokenize"
                )

    def _open(self, info: FileInfo) -> Any:
        path = self.folder / info.file
        try:
            return pa.ipc.open_file(pa.memory_map(str(path)))
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{path} is damaged ({error}): tokenise again with --retokenize") from error

    def _open_batch(self, shard: int, batch: int) -> tuple[np.ndarray, ...]:
        if self._files[shard] is None:
            self._files[shard] = self._open(self.manifest.shards[shard])
        try:
            columns = self._files[shard].get_batch(batch)
        except (OSError, pa.ArrowInvalid, IndexError, ValueError) as error:
            path = self.folder / self.manifest.shards[shard].file
            raise UserError(f"{path} is damaged ({error}): tokenise again with --retokenize") from error
        ids, lengths, roles = (columns.column(name) for name in ("ids", "run_lengths", "run_roles"))
        buffers = (ids.values, ids.offsets, lengths.values, roles.values, lengths.offsets)
        return tuple(as_numpy(buffer) for buffer in buffers)


def _check_size(folder: Path, info: FileInfo) -> None:
    path = folder / info.file
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} is missing ({error.strerror}): tokenise again with --retokenize") from error
    if size != info.bytes:
        raise UserError(
            f"{path} has {size:,} bytes, the manifest says {info.bytes:,}: it is cut short or changed: tokenise "
            "again with --retokenize"
        )
