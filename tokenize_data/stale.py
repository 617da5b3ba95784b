"""Checks whether existing shards match what the user asks for now."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tokenize_data.chat import ChatTemplate
from tokenize_data.dataset import RIGHT, DatasetSpec
from tokenize_data.errors import UserError
from tokenize_data.folders import files_of
from tokenize_data.manifest import Manifest
from tokenize_data.split import Split
from tokenize_data.tokenizer import BaseTokenizer

_DEFAULTS = {entry.name: entry.default for entry in fields(DatasetSpec)} | {
    "truncate": RIGHT
}  # older shards were made with


def refuse_other_tokenizer(manifest: Manifest, tokenizer: BaseTokenizer, template: ChatTemplate, folder: Path) -> None:
    """Raise UserError for shards made with another tokenizer or template."""
    for what, made, now in (
        ("tokenizer", manifest.tokenizer["fingerprint"], tokenizer.fingerprint),
        ("template", manifest.template["fingerprint"], template.fingerprint()),
    ):
        if made != now:
            raise UserError(
                f"{folder} was made with another {what} (fingerprint {made[:16]}) than the base model's ({now[:16]}): "
                "use --retokenize to rebuild it, or another --run_name"
            )


def refuse_other_split(manifest: Manifest, split: Split, is_validation: bool, folder: Path) -> None:
    """Raise UserError unless the validation rows are those that these shards leave out."""
    made = manifest.split
    now = {
        **split.facts(),
        "is_validation": is_validation,
        "seed": made.get("seed"),
    }  # drawn once, independent of the current --seed
    if made != now:
        how = f"with --val {made['val']}" if made.get("val") else "without a split"
        how += f" --val_group {made['group']}" if made.get("group") else ""
        raise UserError(
            f"{folder} was made {how}, so rows for {split.flags} may have been trained: use --retokenize to "
            "rebuild it, or another --run_name"
        )


def refuse_other_files(training: Manifest, validation: Manifest, folder: Path) -> None:
    """Raise UserError unless both sides of a split come from the same bytes."""
    used, kept = (
        [(file["name"], file["sha256"]) for dataset in made.datasets for file in dataset["files"]]
        for made in (training, validation)
    )
    if used != kept:
        changed = next((one[0] for one, other in zip(used, kept, strict=False) if one != other), "the list of files")
        raise UserError(
            f"{folder}: {changed} is not what the training data were made from, so rows for validation may have been "
            "trained: use --retokenize to rebuild both, or another --run_name"
        )


def differences(manifest: Manifest, specs: Sequence[DatasetSpec], seq: int) -> list[str]:
    """Describe differences between the shards and the request; the shards are still used."""
    found = []
    if manifest.seq != seq:
        found.append(f"sequence length: made with --seq {manifest.seq}, asked for {seq}")
    if len(specs) != len(manifest.datasets):
        found.append(f"data sets: made of {len(manifest.datasets)}, asked for {len(specs)}")
        return found
    for spec, made in zip(specs, manifest.datasets, strict=True):
        found += _file_differences(spec, made)
        for key, value in spec.reading().items():
            before = made["reading"].get(key, _DEFAULTS.get(key))
            if before != value and not (key == "format" and value is None):
                found.append(f"{key}: made with {before!r}, asked for {value!r}")
    return found


def _file_differences(spec: DatasetSpec, dataset: dict[str, Any]) -> list[str]:
    made = dataset["files"]
    if dataset.get("asked") == list(spec.files):
        found = [line for file in made if (line := _file_difference(file["name"], file))]
        known = {file["name"] for file in made}
        new = [name for name in _names(spec.files, folders_only=True) if name not in known]
        return [*found, *(f"file {name}: was not there" for name in new)]
    names = _names(spec.files)
    if len(names) != len(made):
        return [f"files: made of {', '.join(file['name'] for file in made)}, asked for {', '.join(spec.files)}"]
    return [line for name, file in zip(names, made, strict=True) if (line := _file_difference(name, file))]


def _names(given: Sequence[str], folders_only: bool = False) -> list[str]:
    """Names, with folders replaced by their files."""
    found: list[str] = []
    for name in given:
        path = Path(name).expanduser()
        if path.is_dir():
            with contextlib.suppress(UserError):
                found += map(str, files_of(name, path))
        elif not folders_only:
            found.append(name)
    return found


def _file_difference(name: str, made: dict[str, Any]) -> str | None:
    path = Path(name).expanduser()
    if not path.exists():
        return None if name == made["name"] and made["mtime_ns"] == 0 else f"file {name}: missing now"
    if made["mtime_ns"] == 0 or not path.is_file():
        return None if name == made["name"] else f"data: made of {made['name']}, asked for {name}"
    status = path.stat()
    # Whether a file is unchanged: programs can reset mtime, but not ctime.
    same_file = name == made["name"] and (status.st_mtime_ns, status.st_ctime_ns) == (
        made["mtime_ns"],
        made.get("ctime_ns"),
    )
    if status.st_size == made["size"] and (same_file or _sha256(path) == made["sha256"]):
        return None
    if status.st_size == made["size"]:
        return f"contents of {name}: not those the shards were made of, though {status.st_size:,} bytes as before"
    return (
        f"contents of {name}: {status.st_size:,} bytes, the shards were made of {made['name']} with "
        f"{made['size']:,} bytes"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
