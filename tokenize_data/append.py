"""New files become new shards behind those that exist. Existing shards, and the order of their rows, stay."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from tokenize_data.arrow_files import FileInfo
from tokenize_data.dataset import DatasetSpec
from tokenize_data.errors import UserError
from tokenize_data.index import Index
from tokenize_data.manifest import Manifest, shuffle_of
from tokenize_data.reader import ShardReader
from tokenize_data.shards import BATCH_DOCUMENTS
from tokenize_data.sources import Source, open_sources

Say = Callable[[str], None]
_STRETCH = 1 << 20  # rows of the index
_MOST_FILES = 1 << 16  # the index counts them with 16 bits


def check_can_append(found: Manifest, seq: int, folder: Path) -> None:
    """Raise UserError unless old and new shards are made alike."""
    if found.seq != seq:
        raise UserError(f"{folder} was made with --seq {found.seq}: append with the same, or use --retokenize")
    if found.split:
        raise UserError(
            f"{folder} was made with --val {found.split['val']}, drawn from all rows, so nothing can be appended: use "
            "--retokenize with all files"
        )
    if found.batch_documents != BATCH_DOCUMENTS:
        raise UserError(f"{folder} was made by another version: use --retokenize with all files")


def new_sources(
    specs: Sequence[DatasetSpec], found: Manifest, say: Say
) -> tuple[tuple[DatasetSpec, ...], tuple[tuple[Source, ...], ...]]:
    """The data sets, reduced to files whose contents are not in the shards yet."""
    known = {(file["size"], file["sha256"]): file["name"] for dataset in found.datasets for file in dataset["files"]}
    sizes = {size for size, _ in known}
    kept = []
    for spec in specs:
        new = []
        for source in open_sources(spec.files):
            before = known.get((source.size, _sha256(source))) if source.size in sizes else None
            if before is None:
                new.append(source)
            else:
                say(f"{source.name} is already among the shards (as {before}): left out")
        if new:
            kept.append((replace(spec, files=tuple(source.name for source in new)), tuple(new)))
    if sum(len(group) for _, group in kept) + len(known) > _MOST_FILES:
        raise UserError(f"more than {_MOST_FILES:,} files: merge some of them")
    return tuple(spec for spec, _ in kept), tuple(group for _, group in kept)


def joined(found: Manifest, added: Manifest, folder: Path, prefix: str) -> Manifest:
    """Write a joint index, and return a manifest of old and new shards. The tokenizer's files are the old ones."""
    index = _joined_index(found, added, folder, f"{prefix}-joined-index.arrow")
    sums = (
        "documents",
        "tokens",
        "trained_tokens",
        "num_cut",
        "num_with_special_text",
        "num_open",
        "num_double_bos",
        "num_shortened",
    )
    counts = {name: getattr(found, name) + getattr(added, name) for name in (*sums, "num_without_bos")}
    return replace(
        found,
        **counts,
        created=added.created,
        shuffle=shuffle_of(counts["documents"]),
        role_tokens=_sum(found.role_tokens, added.role_tokens),
        rows=_sum(found.rows, added.rows),
        rejected_reasons=_sum(found.rejected_reasons, added.rejected_reasons),
        datasets=_datasets(found.datasets, added.datasets),
        shards=[*found.shards, *added.shards],
        index=index,
        seconds=added.seconds,
        fast_tokenizer=added.fast_tokenizer,
        tokenizer={**found.tokenizer, "stop_ids": _union(found.tokenizer["stop_ids"], added.tokenizer["stop_ids"])},
    )


def _joined_index(found: Manifest, added: Manifest, folder: Path, name: str) -> FileInfo:
    """Join the indexes piece by piece, so that neither is in memory as a whole."""
    num_files = sum(len(dataset["files"]) for dataset in found.datasets)
    with contextlib.closing(Index(folder)) as index:
        for manifest, first_source in ((found, 0), (added, num_files)):
            columns = ShardReader.of(folder, manifest).index
            for at in range(0, manifest.documents, _STRETCH):
                stretch = {column: values[at : at + _STRETCH] for column, values in columns.items()}
                index.add({**stretch, "source": stretch["source"] + np.uint16(first_source)})
        return index.write(name)


def _datasets(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the data sets: new files that are read like the last one's belong to it."""
    last, first = before[-1], after[0]
    if any(last.get(key) != first.get(key) for key in ("name", "format", "reading")):
        return [*before, *after]
    both = {**last, "asked": [*last["asked"], *first["asked"]], "files": [*last["files"], *first["files"]]}
    return [*before[:-1], both, *after[1:]]


def _sum(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return dict(Counter(one) + Counter(other)) | {key: 0 for key in one if not one[key] + other.get(key, 0)}


def _union(one: list[int], other: list[int]) -> list[int]:
    return list(dict.fromkeys([*one, *other]))


def _sha256(source: Source) -> str:
    with source.open() as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
