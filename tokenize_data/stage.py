"""The data stage from end to end: uses existing shards or builds them. A reader only ever sees a finished data set."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenize_data import append, lock, manifest, stale
from tokenize_data.bases import Base
from tokenize_data.build import Plan, build, join_parts
from tokenize_data.by_parts import has_all_parts, parts_folder
from tokenize_data.chat import ChatTemplate
from tokenize_data.dataset import DatasetSpec
from tokenize_data.disk import disk_error
from tokenize_data.encode import FastPathError
from tokenize_data.errors import UserError
from tokenize_data.files import open_private
from tokenize_data.manifest import Manifest
from tokenize_data.names import check_run_name
from tokenize_data.parts import PartOf
from tokenize_data.pool import LOCAL
from tokenize_data.sources import Source, open_sources
from tokenize_data.split import Split
from tokenize_data.templates import choose_template
from tokenize_data.tokenizer import BaseTokenizer, load_tokenizer

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A data set to find or to build."""

    run_name: str
    root: Path
    base: Base
    specs: tuple[DatasetSpec, ...] = ()
    template: str = "auto"
    template_values: Mapping[str, Any] = field(default_factory=dict)  # values for the template's switches
    seq: int = 2048
    workers: int | None = 1
    engine: str = LOCAL
    max_bad_rows: int = 0
    retokenize: bool = False
    append: bool = False
    part: PartOf | None = None  # this machine's part
    seed: int = 1234
    split: Split | None = None
    is_validation: bool = False  # the side of the split
    fast: bool = True

    def __post_init__(self) -> None:
        check_run_name(self.run_name)
        for name, value, least in (
            ("seq", self.seq, 2),
            ("workers", self.workers, 1),
            ("max_bad_rows", self.max_bad_rows, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"--{name} {value} must be at least {least}")


def ensure(request: Request, say: Say, warn: Say) -> Manifest | None:
    """Find, wait for, or build the data set, and return its manifest. None if other machines' parts are missing."""
    folder = manifest.dataset_folder(request.root, request.run_name)
    if request.append:
        return _append(request, folder, say)
    tokenizer, template = _tokenizer_and_template(request, say)
    found = None if request.retokenize else _existing(request, folder, tokenizer, template, say, warn)
    if found is not None:
        return found
    if not request.specs:
        raise UserError(f"{folder} has no tokenised data and no --data was given: name the JSONL files with --data")
    plan = _plan(request, tokenizer, template, tuple(tuple(open_sources(spec.files)) for spec in request.specs))
    parts = parts_folder(request.root, plan, request.part.count) if request.part is not None else None
    if request.part is not None and parts is not None and not _has_all_parts(plan, request.part, parts, say):
        return None
    with _alone(request, folder, say):
        after = None if request.retokenize else _existing(request, folder, tokenizer, template, say, warn)
        if after is not None:
            return after
        made = _make(plan, folder, request, say)
        if parts is not None:
            shutil.rmtree(parts.parent, ignore_errors=True)
        return made


def _has_all_parts(plan: Plan, part: PartOf, folder: Path, say: Say) -> bool:
    try:
        return has_all_parts(plan, part, folder, say)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise disk_error(error, folder) from error


@contextlib.contextmanager
def _alone(request: Request, folder: Path, say: Say) -> Iterator[None]:
    """Hold the lock that keeps other processes from building this data set."""
    try:
        request.root.mkdir(parents=True, exist_ok=True)
        with lock.exclusive(
            request.root / f".{request.run_name}.lock", lambda who: say(f"{who} is making {folder}: waiting for it")
        ):
            yield
    except BrokenPipeError:  # the reader of our output is gone
        raise
    except OSError as error:
        raise disk_error(error, request.root) from error


def _tokenizer_and_template(request: Request, say: Say) -> tuple[BaseTokenizer, ChatTemplate]:
    base = load_tokenizer(request.base.path)
    wanted = base.extended(request.base.add_tokens)
    template, tokenizer = choose_template(request.template, wanted, request.template_values)
    own = tokenizer.added[len(wanted.added) :]
    if own:
        say(
            f"template '{template.name}' adds {' '.join(own)} to the tokenizer: embedding and head grow by "
            f"{len(own)} rows in training"
        )
    if wanted.added:
        say(f"checkpoints.toml adds {' '.join(wanted.added)} to the tokenizer")
    return tokenizer, template


def _existing(
    request: Request, folder: Path, tokenizer: BaseTokenizer, template: ChatTemplate, say: Say, warn: Say
) -> Manifest | None:
    found = manifest.read(folder)
    if found is None:
        return None
    stale.refuse_other_tokenizer(found, tokenizer, template, folder)
    if request.split is not None:
        stale.refuse_other_split(found, request.split, request.is_validation, folder)
    say(f"using {folder}: {found.documents:,} documents made {found.created}")
    if request.specs and (lines := stale.differences(found, request.specs, request.seq)):
        warn(
            f"{folder} differs from what was asked for, and is used as it is (--retokenize rebuilds it): "
            + "; ".join(lines)
        )
    return found


# ---- making a data set


def _plan(
    request: Request, tokenizer: BaseTokenizer, template: ChatTemplate, sources: tuple[tuple[Source, ...], ...]
) -> Plan:
    return Plan(
        run_name=request.run_name,
        specs=request.specs,
        sources=sources,
        tokenizer=tokenizer,
        template=template,
        seq=request.seq,
        workers=request.workers,
        engine=request.engine,
        max_bad_rows=request.max_bad_rows,
        seed=request.seed,
        split=request.split,
        is_validation=request.is_validation,
        fast=request.fast,
    )


def _make(plan: Plan, folder: Path, request: Request, say: Say) -> Manifest:
    _check_folder_is_ours(folder)
    existed = folder.exists()
    folder.mkdir(exist_ok=True)
    kept = _read_quietly(folder) if request.retokenize else manifest.read(folder)
    _remove_all_but(folder, kept)
    prefix = f"part-{uuid.uuid4().hex[:8]}"
    try:
        if request.part is not None:
            parts = parts_folder(request.root, plan, request.part.count)
            made = join_parts(plan, request.part.count, parts, folder, prefix, say)
        else:
            made = _build(plan, folder, prefix, kept, say)
        _publish(folder, prefix, made)
    except BaseException:
        with contextlib.suppress(OSError, UserError):
            _remove_all_but(folder, kept)
            if not existed:
                folder.rmdir()
        raise
    _remove_all_but(folder, made)
    return made


def _append(request: Request, folder: Path, say: Say) -> Manifest:
    """Append rows to the data set."""
    if not request.specs:
        raise UserError("--append adds the rows of --data, and no --data was given: name the new files")
    tokenizer, template = _tokenizer_and_template(request, say)
    with _alone(request, folder, say):
        found = manifest.read(folder)
        if found is None:
            raise UserError(f"{folder} has no tokenised data to append to: leave out --append the first time")
        stale.refuse_other_tokenizer(found, tokenizer, template, folder)
        append.check_can_append(found, request.seq, folder)
        specs, sources = append.new_sources(request.specs, found, say)
        if not specs:
            say(f"nothing to append: using {folder} as it is, {found.documents:,} documents")
            return found
        _remove_all_but(folder, found)
        prefix = f"part-{uuid.uuid4().hex[:8]}"
        try:
            added = _build(
                _plan(replace(request, specs=specs), tokenizer, template, sources), folder, prefix, found, say
            )
            made = append.joined(found, added, folder, prefix)
            _join_rejects(folder, prefix)
            _publish(folder, prefix, made)
        except BaseException:
            with contextlib.suppress(OSError, UserError):
                _remove_all_but(folder, found)
            raise
        _remove_all_but(folder, made)
        say(f"{added.documents:,} documents appended to the {found.documents:,} of {folder}")
        return made


def _join_rejects(folder: Path, prefix: str) -> None:
    """Keep earlier rejected rows on the list."""
    before, now = folder / "rejected.jsonl", folder / f"{prefix}-rejected.jsonl"
    if before.exists():
        joined = folder / f"{prefix}-joined-rejected.jsonl"
        with open_private(joined) as file:
            for path in (path for path in (before, now) if path.exists()):
                with path.open("rb") as rows:
                    shutil.copyfileobj(rows, file)
        os.replace(joined, now)


def _build(plan: Plan, folder: Path, prefix: str, kept: Manifest | None, say: Say) -> Manifest:
    """Build with the fast tokenizer; if it fails on a row, start over without it."""
    try:
        return build(plan, folder, prefix, say)
    except FastPathError as difference:
        say(f"the fast tokenizer differs on {str(difference)[:60]!r}: starting again without it")
        _remove_all_but(folder, kept)
        return build(replace(plan, fast=False), folder, prefix, say)


def _publish(folder: Path, prefix: str, made: Manifest) -> None:
    """Publish the files, with the manifest last. Only the list of rejected rows, which is for people, may follow it."""
    rejects = folder / f"{prefix}-rejected.jsonl"
    manifest.write(folder, made)
    if rejects.exists():
        os.replace(rejects, folder / "rejected.jsonl")
    else:
        (folder / "rejected.jsonl").unlink(missing_ok=True)


# ---- files on disk


def _check_folder_is_ours(folder: Path) -> None:
    """Raise UserError for a folder with other files, since we remove files in it later."""
    if not folder.is_dir():
        return
    ours = ("part-", f".{manifest.NAME}", manifest.NAME, "rejected.jsonl")
    foreign = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(ours))
    if foreign:
        names = ", ".join(foreign[:3])
        raise UserError(
            f"{folder} has files that this program did not write ({names}): use another --run_name or "
            "--tokenized_data_dir"
        )


def _read_quietly(folder: Path) -> Manifest | None:
    with contextlib.suppress(UserError):
        return manifest.read(folder)
    return None


def _remove_all_but(folder: Path, kept: Manifest | None) -> None:
    """Remove files that no manifest names: leftovers of a killed run or of a replaced data set."""
    names = {info.file.split("/")[0] for info in kept.all_files()} if kept else set()
    for entry in folder.iterdir():
        if entry.name in names or not entry.name.startswith(("part-", f".{manifest.NAME}.")):
            continue
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
