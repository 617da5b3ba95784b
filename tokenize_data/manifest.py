"""manifest.json: written last, so its presence marks a data set as complete. It names every file with size and
checksum, and what they came from.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tokenize_data.arrow_files import FileInfo
from tokenize_data.errors import UserError
from tokenize_data.files import as_json, replace_private
from tokenize_data.names import check_run_name

NAME = "manifest.json"
VERSION = 1
PERMUTATION, FEISTEL = "permutation", "feistel"  # how training shuffles: all at once, or what is needed
_MOST_PERMUTED = 2**24  # documents; more of them take seconds to permute, whenever a process starts


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The facts about a tokenised data set."""

    version: int = VERSION
    run_name: str
    created: str
    documents: int
    tokens: int
    trained_tokens: int
    role_tokens: dict[str, int]
    rows: dict[str, int]  # read, accepted, rejected, left_out
    rejected_reasons: dict[str, int]
    num_cut: int  # at the right
    num_with_special_text: int
    num_open: int  # documents whose last answer does not end with an end of turn
    num_double_bos: int
    num_without_bos: int
    seq: int
    id_type: str
    batch_documents: int
    tokenizer: dict[str, Any]  # fingerprint, folder, added, vocabulary_size, bos, stop_ids
    template: dict[str, str]  # name, fingerprint
    datasets: list[dict[str, Any]]  # name, format, reading, asked, files with size and sha256
    shards: list[FileInfo]
    index: FileInfo
    files: list[FileInfo]  # the tokenizer's
    versions: dict[str, str]
    num_shortened: int = 0  # documents whose question was shortened
    split: dict[str, Any] = field(default_factory=dict)  # val, seed, group, is_validation; empty where there is none
    shuffle: str = PERMUTATION
    seconds: float = 0.0
    fast_tokenizer: bool = False
    unknown: dict[str, Any] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """A hash of the data: equal for two data sets that train the same."""
        parts = [shard.sha256 for shard in self.shards] + [
            self.index.sha256,
            self.tokenizer["fingerprint"],
            self.template["fingerprint"],
            *([] if self.shuffle == PERMUTATION else [self.shuffle]),
        ]
        return hashlib.sha256("\n".join(parts).encode(errors="surrogatepass")).hexdigest()  # also after an edit by hand

    def all_files(self) -> list[FileInfo]:
        return [*self.shards, self.index, *self.files]


def shuffle_of(documents: int) -> str:
    """How training will shuffle a new data set of this size."""
    return PERMUTATION if documents <= _MOST_PERMUTED else FEISTEL


def dataset_folder(root: Path, run_name: str) -> Path:
    """<root>/<run_name>. Raises UserError if a symbolic link leads out of the root."""
    folder = root / check_run_name(run_name)
    if folder.resolve().parent != root.resolve() or folder.resolve().name != run_name:
        raise UserError(
            f"{folder} is a symbolic link to {folder.resolve()}, outside {root}: remove the link or use another "
            "--run_name"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder: move it away or use another --run_name")
    return folder


def write(folder: Path, manifest: Manifest) -> None:
    """Publish the data set by one atomic replacement."""
    content = {key: value for key, value in asdict(manifest).items() if key != "unknown"}
    replace_private(folder / NAME, as_json(content, indent=1) + b"\n", folder / f".{NAME}.{os.getpid()}", sync=True)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(folder: Path) -> Manifest | None:
    """Read a folder's manifest; None means no data set."""
    file = folder / NAME
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}): tokenise again with --retokenize") from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        found = content.get("version") if isinstance(content, dict) else None
        raise UserError(f"{file} has version {found}, this program reads {VERSION}: tokenise again with --retokenize")
    try:
        known = {name.name for name in fields(Manifest)}
        for key in ("shards", "files"):
            content[key] = [FileInfo(**entry) for entry in content[key]]
        content["index"] = FileInfo(**content["index"])
        unknown = {key: content.pop(key) for key in list(content) if key not in known}
        found = Manifest(**content, unknown=unknown)
        _check(found)
        return found
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}): tokenise again with --retokenize") from error


def _check(manifest: Manifest) -> None:
    """Check what readers rely on. Raises TypeError, KeyError or ValueError."""
    names = ("documents", "batch_documents", "seq", "num_shortened")
    counts = {name: getattr(manifest, name) for name in names}
    for info in manifest.all_files():
        texts = [info.file, info.sha256]
        if (
            not all(isinstance(text, str) for text in texts)
            or Path(info.file).is_absolute()
            or ".." in Path(info.file).parts
        ):
            raise ValueError(f"{info.file!r} is not one of its files")
        counts |= {f"bytes of {info.file}": info.bytes, f"documents of {info.file}": info.documents}
    wrong = [f"{name} is {value!r}" for name, value in counts.items() if type(value) is not int or value < 0]
    if wrong or manifest.batch_documents < 1 or not all(info.file.isprintable() for info in manifest.all_files()):
        raise ValueError(wrong[0] if wrong else "it has been edited")
    if sum(shard.documents for shard in manifest.shards) != manifest.documents:
        raise ValueError(f"the shards do not have {manifest.documents} documents")
    if manifest.shuffle not in (PERMUTATION, FEISTEL):
        raise ValueError(f"shuffle is {manifest.shuffle!r}")
    for text in (manifest.tokenizer["fingerprint"], manifest.template["fingerprint"]):
        if not isinstance(text, str):
            raise ValueError(f"a fingerprint is {text!r}")
    for dataset in manifest.datasets:
        for file in dataset["files"]:
            if not isinstance(file["name"], str):
                raise ValueError(f"a data set's file is {file['name']!r}")
