"""Finds the files in a data folder: its training split's, or those written by `save_to_disk` of Hugging Face
datasets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenize_data.dataset_info import NAME, entries_in, listing
from tokenize_data.errors import UserError
from tokenize_data.streams import COMPRESSED

_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_NO_DATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SPLIT = re.compile(
    r"(?:^|[\W\d_])(?:(?P<train>train(?:ing)?)|(?P<validation>valid(?:ation)?|val|dev)|(?P<test>test(?:ing)?|eval(?:uation)?))(?:$|[\W\d_])"
)


def kind_of(path: Path) -> str | None:
    """The kind of a file by its name's ending; None if unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_compressed = bool(suffixes) and suffixes[-1] in COMPRESSED
    inner = suffixes[:-1] if is_compressed else suffixes
    return _KINDS.get(inner[-1] if inner else "") or ("jsonl" if is_compressed else None)


def files_of(name: str, folder: Path) -> list[Path]:
    """The data files of a folder; with splits, the training ones."""
    if (folder / "dataset_dict.json").is_file():
        return _saved(name, _saved_split(name, folder))
    if (folder / "state.json").is_file():
        return _saved(name, folder)
    if entries := entries_in(folder):
        raise UserError(
            f"{name} has a {NAME} with the data sets {listing(entries)}: name one, such as "
            f"{Path(name) / NAME}:{entries[0]}"
        )
    files = [file for file in sorted(folder.rglob("*")) if _is_data(file.relative_to(folder)) and file.is_file()]
    if not files:
        raise UserError(
            f"{name} is a directory without data files: give JSONL files, or a folder that save_to_disk wrote"
        )
    chosen = _to_train_on(name, folder, files)
    kinds = sorted({kind_of(file) or "" for file in chosen})
    if len(kinds) > 1:
        raise UserError(
            f"{name} has files of several kinds ({', '.join(kinds)}), which may hold the same rows: name those to read"
        )
    return chosen


def _is_data(file: Path) -> bool:
    return (
        kind_of(file) is not None
        and file.name not in _NO_DATA
        and not any(part.startswith((".", "__")) for part in file.parts)
    )


def _to_train_on(name: str, folder: Path, files: Sequence[Path]) -> list[Path]:
    splits: dict[str, list[Path]] = {}
    for file in files:
        found = _SPLIT.search(str(file.relative_to(folder)).lower())
        splits.setdefault(str(found.lastgroup) if found else "others", []).append(file)
    if "train" in splits or len(splits) == 1:
        return splits.get("train") or next(iter(splits.values()))
    raise UserError(
        f"{name} has files of {', '.join(sorted(splits))}, and none of a split 'train': name the files to read"
    )


def _saved_split(name: str, folder: Path) -> Path:
    splits = _saved_json(name, folder / "dataset_dict.json").get("splits")
    if not isinstance(splits, list) or not splits or not all(isinstance(split, str) for split in splits):
        raise UserError(
            f"{name} cannot be read: its dataset_dict.json names no splits: save it again with save_to_disk"
        )
    if "train" in splits or len(splits) == 1:
        return folder / ("train" if "train" in splits else splits[0])
    raise UserError(f"{name} has the splits {', '.join(splits)}: give the folder of one, such as {folder / splits[0]}")


def _saved(name: str, folder: Path) -> list[Path]:
    """The Arrow files of a folder that `save_to_disk` wrote, in order."""
    state = _saved_json(name, folder / "state.json")
    if state.get("_indices_data_files"):
        raise UserError(
            f"{name} holds rows that were chosen or shuffled, by their numbers: save it again with an up-to-date "
            "datasets"
        )
    entries = state.get("_data_files")
    names: list[Any] = (
        [entry.get("filename") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    )
    if not names or not all(isinstance(file, str) and file == Path(file).name for file in names):
        raise UserError(f"{name} cannot be read: its state.json names no data files: save it again with save_to_disk")
    return [folder / file for file in names]


def _saved_json(name: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{name} cannot be read: {file.name}: {error}: save it again with save_to_disk") from error
    return content if isinstance(content, dict) else {}
