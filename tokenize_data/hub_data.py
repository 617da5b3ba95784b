"""The files of a data set on the Hub: `datasets` says which ones a split has, huggingface_hub fetches them; both read
no rows.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenize_data.errors import UserError
from tokenize_data.folders import files_of

_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+){0,2}")


@dataclass(frozen=True)
class HubFile:
    """A fetched file: `name` for messages, `path` of the local copy."""

    name: str
    path: Path


def is_name(name: str) -> bool:
    """owner/name, owner/name:SPLIT or owner/name:CONFIGURATION:SPLIT."""
    return _NAME.fullmatch(name) is not None


def files(name: str) -> list[HubFile]:
    """The files of the named split, else of `train`, else of the only split."""
    repository, *rest = name.split(":")
    for logger in ("datasets", "huggingface_hub"):  # errors are reported once, below
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    try:
        if _is_offline():
            return _fetched_before(name, repository, is_whole=not rest)
        splits = _splits(repository, rest[0] if len(rest) == 2 else None)
        return [_fetch(url) for url in splits[_choose(name, rest, list(splits))]]
    except UserError:
        raise
    except Exception as error:  # both libraries raise dozens of kinds
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(
            f"{name} is not a file here, and cannot be read from the Hub: {type(error).__name__}: {reason}"
        ) from error


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _fetched_before(name: str, repository: str, is_whole: bool) -> list[HubFile]:
    """Read a fetched snapshot like any folder, since the splits are unknown without the Hub."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repository, repo_type="dataset", local_files_only=True))
    if not is_whole:
        raise UserError(f"{name}: HF_HUB_OFFLINE is set, and splits are known to the Hub alone: give files of {folder}")
    return [HubFile(f"{repository}/{file.relative_to(folder)}", file) for file in files_of(str(folder), folder)]


def _splits(repository: str, configuration: str | None) -> dict[str, list[str]]:
    """The addresses of each split's files. The builder reads no rows, since it would guess types and keep copies."""
    import datasets  # slow to import, and only needed here

    datasets.disable_progress_bars()
    files: Any = datasets.load_dataset_builder(repository, configuration).config.data_files
    if not files:
        raise UserError(
            f"{repository} has no data files that can be read without a program of its own: export it as JSONL"
        )
    return {str(split): [str(url) for url in urls] for split, urls in files.items()}


def _choose(name: str, rest: list[str], splits: list[str]) -> str:
    if rest:
        if rest[-1] in splits:
            return rest[-1]
        raise UserError(f"{name}: no split '{rest[-1]}': it has {', '.join(splits)}")
    if "train" in splits or len(splits) == 1:
        return "train" if "train" in splits else splits[0]
    raise UserError(f"{name} has the splits {', '.join(splits)}: name one as {name}:SPLIT")


def _fetch(url: str) -> HubFile:
    from huggingface_hub import HfFileSystem, hf_hub_download

    place: Any = HfFileSystem().resolve_path(url)
    path = hf_hub_download(place.repo_id, place.path_in_repo, repo_type="dataset", revision=place.revision)
    return HubFile(f"{place.repo_id}/{place.path_in_repo}", Path(path))
