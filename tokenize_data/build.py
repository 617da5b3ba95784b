"""Builds one data set's files: converts every row of every source, in order, to shards, and returns the manifest."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tokenize_data import __version__, ray_pool
from tokenize_data.arrow_files import FileInfo
from tokenize_data.chat import ChatTemplate
from tokenize_data.choose import choose_rows, recognise_format
from tokenize_data.convert import Choice, Converted, Converter
from tokenize_data.dataset import DatasetSpec
from tokenize_data.encode import Encoder
from tokenize_data.errors import RowError
from tokenize_data.manifest import Manifest, shuffle_of
from tokenize_data.parts import PartOf, read_facts, read_parts, write_part
from tokenize_data.pool import LOCAL, RAY, ordered_map
from tokenize_data.progress import Progress
from tokenize_data.records import RowReader
from tokenize_data.rendered import ROLE_NAMES
from tokenize_data.shards import BATCH_DOCUMENTS, ShardWriter
from tokenize_data.sources import Chunk, Source
from tokenize_data.split import Split, part_of
from tokenize_data.tally import Tally
from tokenize_data.tokenizer import BaseTokenizer

_NUM_PROOF_ROWS = 192
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that determines a data set's files, except their folder."""

    run_name: str
    specs: tuple[DatasetSpec, ...]
    sources: tuple[tuple[Source, ...], ...]  # for each spec
    tokenizer: BaseTokenizer
    template: ChatTemplate
    seq: int
    workers: int | None  # None, with Ray: as many as the cluster has CPUs
    max_bad_rows: int
    seed: int
    fast: bool
    engine: str = LOCAL
    split: Split | None = None
    is_validation: bool = False  # the side of the split

    @property
    def files(self) -> list[Source]:
        """The files of all data sets, in order."""
        return [source for group in self.sources for source in group]

    @property
    def id_type(self) -> np.dtype[Any]:
        return np.dtype(np.uint16 if self.tokenizer.vocabulary_size <= 1 << 16 else np.uint32)


def build(plan: Plan, folder: Path, prefix: str, say: Say) -> Manifest:
    """Write all files, with names that start with `prefix`, and return their manifest."""
    begun, formats = time.monotonic(), _formats(plan, say)
    converter = _converter(plan, formats, folder)
    _prove_fast_path(converter, plan.files, say)
    converted = _mapped(plan, converter, _chunks(plan), say)
    return _write(plan, formats, converted, folder, prefix, begun, converter.encoder.is_fast)


def build_part(plan: Plan, part: PartOf, folder: Path, say: Say) -> None:
    """Convert one machine's share of the rows."""
    converter = _converter(plan, _formats(plan, say), folder)
    _prove_fast_path(converter, plan.files, say)
    with Progress(f"tokenising part {part.number} of {part.count}", [source.size for source in plan.files]) as progress:

        def watched() -> Iterator[Converted]:
            documents = rejected = 0
            for converted in _mapped(plan, converter, part.own(_chunks(plan)), say):
                documents, rejected = documents + len(converted.lengths), rejected + len(converted.rejects)
                if rejected > plan.max_bad_rows:
                    first, source = converted.rejects[0], plan.files[converted.chunk.source]
                    raise RowError(f"{source.place(first.line)}: {first.reason} (--max_bad_rows {plan.max_bad_rows})")
                progress.update(converted.chunk.source, converted.chunk.bytes_read, documents)
                yield converted

        write_part(part.file(folder), watched(), plan.files, converter.encoder.is_fast)


def join_parts(plan: Plan, count: int, parts: Path, folder: Path, prefix: str, say: Say) -> Manifest:
    """Join the parts of all machines into what `build` would have written."""
    begun, formats = time.monotonic(), _formats(plan, lambda _: None)
    is_fast = read_facts(parts, count, plan.files)
    say(f"joining {count:,} parts")
    return _write(plan, formats, read_parts(parts, count, plan.id_type), folder, prefix, begun, is_fast)


def _mapped(plan: Plan, converter: Converter, chunks: Iterator[Chunk], say: Say) -> Iterator[Converted]:
    if plan.engine == RAY:
        return ray_pool.ordered_map(converter, chunks, plan.workers, say)
    return ordered_map(converter, chunks, plan.workers or 1)


def _formats(plan: Plan, say: Say) -> list[str]:
    found = []
    for spec, group in zip(plan.specs, plan.sources, strict=True):
        name, line = recognise_format(spec, group)
        found.append(name)
        say(line)
    return found


def _chunks(plan: Plan) -> Iterator[Chunk]:
    return (chunk for index, source in enumerate(plan.files) for chunk in source.chunks(index))


def _write(
    plan: Plan,
    formats: Sequence[str],
    chunks: Iterator[Converted],
    folder: Path,
    prefix: str,
    begun: float,
    is_fast: bool,
) -> Manifest:
    writer = ShardWriter(folder, prefix, plan.id_type)
    tally = Tally(plan.max_bad_rows, plan.files, folder / f"{prefix}-rejected.jsonl")
    try:
        with Progress(f"tokenising {plan.run_name}", [source.size for source in plan.files]) as progress:
            for converted in chunks:
                writer.add(converted)
                tally.add(converted)
                progress.update(converted.chunk.source, converted.chunk.bytes_read, tally.documents)
        tally.finish()
        shards, index = writer.close()
        files = _save_tokenizer(plan, folder, f"{prefix}-tokenizer")
    except BaseException:
        writer.abandon()
        raise
    finally:
        tally.close()
    return Manifest(
        run_name=plan.run_name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        documents=tally.documents,
        tokens=sum(tally.role_tokens),
        trained_tokens=tally.trained,
        role_tokens=dict(zip(ROLE_NAMES, tally.role_tokens, strict=True)),
        rows=tally.rows(),
        rejected_reasons=dict(tally.reasons),
        num_cut=tally.cut,
        num_shortened=tally.shortened,
        num_with_special_text=tally.injected,
        num_open=tally.open,
        num_double_bos=tally.double_bos,
        num_without_bos=tally.without_bos,
        seq=plan.seq,
        id_type=str(plan.id_type),
        batch_documents=BATCH_DOCUMENTS,
        tokenizer=_tokenizer_facts(plan, formats, f"{prefix}-tokenizer"),
        template={"name": plan.template.name, "fingerprint": plan.template.fingerprint()},
        datasets=_describe(plan, formats, tally),
        split={**plan.split.facts(), "is_validation": plan.is_validation} if plan.split is not None else {},
        shuffle=shuffle_of(tally.documents),
        shards=shards,
        index=index,
        files=files,
        versions=_versions(),
        seconds=round(time.monotonic() - begun, 2),
        fast_tokenizer=is_fast,
    )


def _tokenizer_facts(plan: Plan, formats: Sequence[str], folder: str) -> dict[str, Any]:
    tokenizer = plan.tokenizer
    return {
        "fingerprint": tokenizer.fingerprint,
        "folder": folder,
        "added": list(tokenizer.added),
        "vocabulary_size": tokenizer.vocabulary_size,
        "bos": _id(tokenizer, tokenizer.special("bos_token")),
        "adds_bos": tokenizer.adds_bos,
        "stop_ids": _stop_ids(tokenizer, plan.template, formats),
    }


def _converter(plan: Plan, formats: Sequence[str], scratch: Path) -> Converter:
    tokenizer = plan.tokenizer
    pairs = list(zip(plan.specs, formats, plan.sources, strict=True))
    special = [tokenizer.backend.token_to_id(text) for text in tokenizer.special_texts()]
    bos = tokenizer.special("bos_token")
    return Converter(
        readers=[RowReader(spec, name) for spec, name, group in pairs for _ in group],
        choices=_choices(plan, scratch),
        template=plan.template,
        encoder=Encoder(tokenizer, plan.fast),
        seq=plan.seq,
        id_type=plan.id_type,
        bos=bos if bos and tokenizer.adds_bos else "",
        bos_id=_id(tokenizer, bos),
        eos=tokenizer.special("eos_token") or "",
        stop_ids=_stop_ids(tokenizer, plan.template, formats),
        special_ids=[number for number in special if number is not None],
    )


def _choices(plan: Plan, scratch: Path) -> list[Choice]:
    part = part_of(plan.split, plan.files, plan.is_validation, scratch) if plan.split is not None else None
    choices: list[Choice] = []
    for spec, group in zip(plan.specs, plan.sources, strict=True):
        choices += choose_rows(spec, group, plan.seed, scratch, part, first=len(choices))
    return choices


def _prove_fast_path(converter: Converter, sources: Sequence[Source], say: Say) -> None:
    if not converter.encoder.is_fast:
        return
    each = max(_NUM_PROOF_ROWS // len(sources), 8)
    texts: list[str] = []
    for index, source in enumerate(sources):
        for chunk in islice(source.chunks(index), 1):
            lines = [row for _, row in chunk.rows() if isinstance(row, bytes)]
            for line in lines[:: max(len(lines) // each, 1)][:each]:
                with contextlib.suppress(RowError):
                    texts += [document.text for document in converter.render(line, index)]
    different = converter.encoder.prove(texts)
    if different is None:
        say(f"fast tokenizer: same ids as the Hugging Face one on {len(texts)} of your rows, used")
    else:
        say(f"fast tokenizer: not the same ids as the Hugging Face one on {different[:60]!r}, not used")


def _save_tokenizer(plan: Plan, folder: Path, name: str) -> list[FileInfo]:
    plan.tokenizer.save(folder / name, plan.template.source)
    infos = []
    for file in sorted((folder / name).iterdir()):
        data = file.read_bytes()
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        infos.append(FileInfo(f"{name}/{file.name}", len(data), hashlib.sha256(data).hexdigest()))
    return infos


def _describe(plan: Plan, formats: Sequence[str], tally: Tally) -> list[dict[str, Any]]:
    rows = iter(tally.rows_of_source)
    return [
        {
            "name": spec.name,
            "format": name,
            "reading": spec.reading(),
            "asked": list(spec.files),
            "files": [_describe_source(source, next(rows)) for source in group],
        }
        for spec, name, group in zip(plan.specs, formats, plan.sources, strict=True)
    ]


def _describe_source(source: Source, rows: int) -> dict[str, Any]:
    """Describe a source for the manifest. Times of 0 mark a Hub file, which is not compared again."""
    times = (0, 0) if source.is_remote else (source.mtime_ns, source.ctime_ns)
    return {
        "name": source.name,
        "size": source.size,
        "sha256": source.sha256,
        "mtime_ns": times[0],
        "ctime_ns": times[1],
        "rows": rows,
    }


def _id(tokenizer: BaseTokenizer, token: str | None) -> int | None:
    return tokenizer.backend.token_to_id(token) if token else None


def _stop_ids(tokenizer: BaseTokenizer, template: ChatTemplate, formats: Sequence[str]) -> list[int]:
    """The tokens that end what the model writes: the template's end of turn, and EOS."""
    texts = [tokenizer.special("eos_token")]
    if any(name != "text" for name in formats):
        texts.insert(0, template.end_of_turn())
    ids = [identifier for text in texts if (identifier := _id(tokenizer, text)) is not None]
    return list(dict.fromkeys(ids))


def _versions() -> dict[str, str]:
    packages = {name: metadata.version(name) for name in ("tokenizers", "pyarrow", "numpy", "tiktoken", "jinja2")}
    return {"tokenize_data": __version__, "python": platform.python_version(), **packages}
