"""Converted chunks on disk, so that several machines can share the work. Chunk k belongs to part k modulo N. Joining
them in order gives what one machine would have given, byte for byte.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tokenize_data.arrow_files import as_array, as_numpy
from tokenize_data.convert import Converted, Reject
from tokenize_data.errors import UserError
from tokenize_data.files import open_private
from tokenize_data.sources import Chunk, Source

_PART = re.compile(r"(\d{1,6})/(\d{1,6})")
_LISTS = ("lengths", "trained", "cut", "lines", "runs_per_document", "run_lengths", "run_roles", "num_role_tokens")
_COUNTS = (
    "read",
    "accepted",
    "left_out",
    "num_injected",
    "num_open",
    "num_double_bos",
    "num_without_bos",
    "num_shortened",
)
_FACTS = ("size", "sha256", "mtime_ns", "ctime_ns")


@dataclass(frozen=True)
class PartOf:
    """One machine's share: `number` of `count`, counted from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> PartOf:
        found = _PART.fullmatch(text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"--part {text}: write i/N, such as 3/8 for the third of eight")
        return cls(int(found[1]), int(found[2]))

    def own(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        return (chunk for number, chunk in enumerate(chunks) if number % self.count == self.number - 1)

    def file(self, folder: Path) -> Path:
        return folder / f"{self.number}-of-{self.count}.arrow"

    def missing(self, folder: Path) -> list[int]:
        every = (PartOf(number, self.count) for number in range(1, self.count + 1))
        return [part.number for part in every if not part.file(folder).exists()]


def write_part(file: Path, converted: Iterable[Converted], sources: Sequence[Source], is_fast: bool) -> None:
    """Write a part, which becomes visible once complete. The sources' facts come last, since they are known at the
    end.
    """
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    schema = pa.schema(
        {"facts": pa.string(), "ids": pa.list_(pa.uint32()), **{name: pa.list_(pa.uint32()) for name in _LISTS}}
    )
    try:
        with open_private(scratch) as raw, pa.ipc.new_stream(raw, schema) as writer:
            for one in converted:
                writer.write_batch(_batch(json.dumps(_facts_of(one)), one, schema))
            end = {"sources": [{name: getattr(source, name) for name in _FACTS} for source in sources], "fast": is_fast}
            writer.write_batch(_batch(json.dumps(end), Converted(Chunk(0, 0, b"", 0)), schema))
        os.replace(scratch, file)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def read_parts(folder: Path, count: int, id_type: np.dtype[Any]) -> Iterator[Converted]:
    """All chunks, in order."""
    readers = [_chunks(PartOf(number, count).file(folder), id_type) for number in range(1, count + 1)]
    turn = 0
    while (one := next(readers[turn % count], None)) is not None:
        yield one
        turn += 1


def read_facts(folder: Path, count: int, sources: Sequence[Source]) -> bool:
    """Set the facts of each source. Returns whether all parts used the fast tokenizer."""
    ends = [_end(PartOf(number, count).file(folder)) for number in range(1, count + 1)]
    for index, source in enumerate(sources):
        facts = [end["sources"][index] for end in ends]
        if any((one["sha256"], one["size"]) != (facts[0]["sha256"], facts[0]["size"]) for one in facts):
            raise UserError(f"{source.name} was changed between the parts: start all parts again with --retokenize")
        for name in _FACTS:
            setattr(source, name, facts[0][name])
    return all(end["fast"] for end in ends)


def _facts_of(one: Converted) -> dict[str, Any]:
    chunk = {entry.name: getattr(one.chunk, entry.name) for entry in fields(Chunk) if entry.name not in ("data", "bad")}
    rejects = [{**asdict(reject), "raw": reject.raw.decode("latin-1")} for reject in one.rejects]
    return {"chunk": chunk, "rejects": rejects, **{name: getattr(one, name) for name in _COUNTS}}


def _batch(facts: str, one: Converted, schema: pa.Schema) -> pa.RecordBatch:
    lists = [one.ids.astype(np.uint32), *(np.array(getattr(one, name), dtype=np.uint32) for name in _LISTS)]
    columns = [pa.ListArray.from_arrays(as_array(np.array([0, len(v)], np.int32)), as_array(v)) for v in lists]
    return pa.record_batch([pa.array([facts]), *columns], schema=schema)


def _batches(file: Path) -> Iterator[tuple[dict[str, Any], pa.RecordBatch]]:
    try:
        with pa.memory_map(str(file)) as raw, pa.ipc.open_stream(raw) as reader:
            for batch in reader:
                yield json.loads(batch.column("facts")[0].as_py()), batch
    except (OSError, pa.ArrowException, ValueError, KeyError) as error:
        raise UserError(f"{file} is damaged ({error}): remove it, and make this part again") from error


def _chunks(file: Path, id_type: np.dtype[Any]) -> Iterator[Converted]:
    for facts, batch in _batches(file):
        if "chunk" not in facts:
            return
        rejects = [Reject(one["line"], one["reason"], one["raw"].encode("latin-1")) for one in facts.pop("rejects")]
        lists = {name: as_numpy(batch.column(name).values).tolist() for name in _LISTS}
        ids = as_numpy(batch.column("ids").values).astype(id_type)
        chunk = replace(Chunk(0, 0, b"", 0), **facts.pop("chunk"))
        yield Converted(chunk, rejects=rejects, ids=ids, **lists, **facts)


def _end(file: Path) -> dict[str, Any]:
    last: dict[str, Any] = {}
    for facts, _ in _batches(file):
        last = facts
    if "sources" not in last:
        raise UserError(f"{file} is damaged: remove it, and make this part again")
    return last
