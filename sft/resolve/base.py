"""Reads facts about the base model without torch: where it is, its configuration, its size."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from sft.config.settings import Settings
from sft.families.sizes import check_sizes
from sft.model.base_folder import gguf_file_in, resolve, resolve_here
from sft.resolve.naming import intermediate_name
from sft.spec.base import BaseModel
from tokenize_data.bases import Base, find_base
from tokenize_data.errors import UserError

_SAMPLES, _BLOCK_BYTES = 64, 4096

_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a plan needs to know about a base model. The weights may be elsewhere."""

    entry: Base
    folder: Path
    config: dict[str, Any]
    num_stored: int | None  # number of weights in the files; None if they are not on this machine
    is_entry: bool


def describe_base_model(settings: Settings) -> Described:
    """Describe the base model that the flags name, as far as this machine has it."""
    given = Path(settings.model.checkpoint).expanduser()
    is_folder = (given / "config.json").is_file()  # a plan needs no tokenizer
    entry = Base(name=given.resolve().name, path=str(given)) if is_folder else _entry(settings)
    inner = None
    if settings.model.intermediate_iter is not None:
        inner = intermediate_name(entry.intermediate, settings.model.intermediate_iter, f"the entry of {entry.name}")
    folder = resolve_here(entry.path, inner)
    headers = [_header(file) for file in sorted(folder.glob("*.safetensors"))]
    sizes = {name: tensor["shape"] for header in headers for name, tensor in header.items() if name != "__metadata__"}
    return Described(
        entry=entry,
        folder=folder,
        config=_read_config(folder),
        num_stored=sum(prod(shape) for shape in sizes.values()) or None,
        is_entry=_is_entry(settings),
    )


def find_base_model(settings: Settings) -> BaseModel:
    """Find the base model that the flags name; fetch or convert it if necessary."""
    entry = _entry(settings)
    inner = None
    if settings.model.intermediate_iter is not None:
        inner = intermediate_name(entry.intermediate, settings.model.intermediate_iter, f"the entry of {entry.name}")
    if settings.model.trust_remote_code and not Path(entry.path).expanduser().exists() and inner is None:
        raise UserError(
            f"--trust_remote_code runs code from {entry.path}, which may change: download a revision that you "
            "have read, give its folder"
        )
    folder = resolve(entry.path, inner)
    content = _read_config(folder)
    headers = [_header(file) for file in sorted(folder.glob("*.safetensors"))]
    if not headers:
        from sft.model.weights import WeightFiles  # its message is complete

        WeightFiles(folder)
    sizes = {name: tensor["shape"] for header in headers for name, tensor in header.items() if name != "__metadata__"}
    digest = hashlib.sha256(json.dumps([content, sizes], sort_keys=True).encode())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(_sample(file))
    total = sum(prod(shape) for shape in sizes.values())
    return BaseModel(
        entry=entry,
        folder=folder,
        config=content,
        num_parameters=total,
        is_entry=_is_entry(settings),
        fingerprint=digest.hexdigest(),
    )


def tokenizer_flags(settings: Settings, base: BaseModel) -> list[str]:
    """The data stage's flags for the base model: as typed, or an entry written for it if the files are elsewhere."""
    given = Path(base.entry.path).expanduser()
    if given == base.folder or (
        settings.model.intermediate_iter is None and not given.exists()
    ):  # a folder, or a Hub id
        flags = ["--checkpoint", settings.model.checkpoint]
        flags += ["--size", settings.model.size] if settings.model.size else []
        return [
            *flags,
            *(["--checkpoints_file", settings.model.checkpoints_file] if settings.model.checkpoints_file else []),
        ]
    handle, name = tempfile.mkstemp(prefix="sft-", suffix=".toml")
    with os.fdopen(handle, "w") as file:
        tokens = json.dumps(list(base.entry.add_tokens), ensure_ascii=False)
        file.write(f"[resolved.base]\npath = {json.dumps(str(base.folder))}\nadd_tokens = {tokens}\n")
    return ["--checkpoint", "resolved", "--size", "base", "--checkpoints_file", name]


def _is_entry(settings: Settings) -> bool:
    return os.sep not in settings.model.checkpoint and not Path(settings.model.checkpoint).expanduser().exists()


def _entry(settings: Settings) -> Base:
    if gguf_file_in(settings.model.checkpoint) is not None:
        return Base(name=Path(settings.model.checkpoint).stem, path=settings.model.checkpoint)
    return find_base(
        settings.model.checkpoint,
        settings.model.size,
        Path(settings.model.checkpoints_file) if settings.model.checkpoints_file else None,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(
            f"{file}: {error.strerror}: give the folder of a Hugging Face model, with its config.json"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}): fetch the base model again") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise UserError(f"{file} has no model_type: give the folder of a Hugging Face model")
    check_sizes(content, file)
    return content


def _sample(file: Path) -> bytes:
    """Read a few blocks spread over a file, to tell models of the same shape apart."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        blocks = []
        for number in range(_SAMPLES):
            stream.seek(max(0, size - _BLOCK_BYTES) * number // (_SAMPLES - 1))
            blocks.append(stream.read(_BLOCK_BYTES))
    return b"".join(blocks)


def _header(file: Path) -> dict[str, Any]:
    """Read the header of a safetensors file: names, types and shapes."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= min(file.stat().st_size - 8, _MAX_HEADER_BYTES):
                raise ValueError("its header is longer than the file, or than any header")
            header = json.loads(stream.read(length))
            if not all(isinstance(tensor["shape"], list) for name, tensor in header.items() if name != "__metadata__"):
                raise ValueError("a tensor has no shape")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as safetensors ({error}): fetch the base model again") from error
    assert isinstance(header, dict)
    return header
