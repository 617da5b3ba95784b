"""Writes a Hugging Face folder in pieces, so that no process holds the whole model. Each stage fills a ShardWriter in
a shared folder; then one process names the files with `finish`, adds configuration and tokenizer, and moves the
folder to its place with `publish`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tokenize_data.errors import UserError, shorten
from tokenize_data.prompts import ChatFormat
from tokenize_data.templates import choose_template
from tokenize_data.tokenizer import load_tokenizer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "*token*.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "tokenizer.model.*",
    "chat_template.json",
    "*.jinja",
)


class ShardWriter:
    """Writes one stage's tensors to files of at most `limit_bytes` (a larger tensor gets its own file). CPU tensors
    are not copied: do not change them before `close`.
    """

    def __init__(self, folder: Path, stage: int, limit_bytes: int = 5_000_000_000) -> None:
        self._folder, self._stage, self._limit = folder, stage, limit_bytes
        self._waiting: dict[str, Tensor] = {}
        self._names: set[str] = set()
        self._parts: list[dict[str, Any]] = []
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        assert name not in self._names, name
        self._names.add(name)
        if self._waiting and self._num_bytes() + tensor.nbytes > self._limit:
            self._flush()
        plain = tensor.detach().to("cpu").contiguous()
        # safetensors writes a view's whole storage, and rejects two tensors that share one.
        self._waiting[name] = plain.clone() if plain.untyped_storage().nbytes() != plain.nbytes else plain
        if self._num_bytes() >= self._limit:
            self._flush()

    @property
    def names(self) -> frozenset[str]:
        """Names of the added tensors."""
        return frozenset(self._names)

    def close(self) -> list[dict[str, Any]]:
        """Finish writing. Returns {file, names, bytes} of each file."""
        if self._waiting:
            self._flush()
        return self._parts

    def _num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._waiting.values())

    def _flush(self) -> None:
        file = self._folder / f"part-{self._stage:04d}-{len(self._parts) + 1:04d}.safetensors"
        with _writing(file):
            save_file(self._waiting, file, metadata={"format": "pt"})
            file.chmod(0o644)  # safetensors creates it readable by the owner only
            _fsync(file)
        self._parts.append({"file": file.name, "names": list(self._waiting), "bytes": self._num_bytes()})
        self._waiting = {}


def finish(folder: Path, parts: Sequence[Mapping[str, Any]]) -> None:
    """Name the files of all stages as transformers expects, and write an index if there are several."""
    parts = sorted(parts, key=lambda part: part["file"])
    assert parts, folder
    names = (
        [SINGLE]
        if len(parts) == 1
        else [f"model-{n:05d}-of-{len(parts):05d}.safetensors" for n in range(1, len(parts) + 1)]
    )
    weight_map = {tensor: name for part, name in zip(parts, names, strict=True) for tensor in part["names"]}
    assert len(weight_map) == sum(len(part["names"]) for part in parts), "two stages wrote the same parameter"
    for part, name in zip(parts, names, strict=True):
        with _writing(folder / name):
            os.replace(folder / part["file"], folder / name)
    if len(parts) > 1:
        total = sum(part["bytes"] for part in parts)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def write_config(
    folder: Path, config: Any, generation_config: Any | None, dtype: torch.dtype, vocabulary_size: int
) -> None:
    """Write config.json and generation_config.json of the trained model, without changing the given objects."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    config = copy.deepcopy(config)
    config.dtype = dtype
    config.get_text_config().vocab_size = vocabulary_size
    if config.model_type in CLASSES:
        config.architectures = [CLASSES[config.model_type]]
    write_json(folder / "config.json", _without_origins(config.to_diff_dict()))
    if generation_config is not None:
        # Its save_pretrained rejects settings of many base models, such as a temperature without sampling.
        content = json.loads(generation_config.to_json_string())
        write_json(folder / "generation_config.json", _without_origins(content))


def stop_at_turns(folder: Path) -> None:
    """Add the template's end of turn to the stop tokens, so that transformers and servers stop where an answer ends.
    Call it after `write_config` and `copy_tokenizer`. The base's own stop tokens stay.
    """
    tokenizer = load_tokenizer(str(folder))
    if tokenizer.chat_template is None:
        return
    template, extended = choose_template("auto", tokenizer)
    file = folder / "generation_config.json"
    config = json.loads((folder / "config.json").read_bytes())
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    content = (
        json.loads(file.read_bytes())
        if file.exists()
        else {name: config[name] for name in tokens if config.get(name) is not None}
    )
    known = content.get("eos_token_id")
    known = known if isinstance(known, list) else [] if known is None else [known]
    stops = list(dict.fromkeys([*known, *ChatFormat(tokenizer=extended, template=template).stop_ids]))
    if stops != known:
        write_json(file, content | {"eos_token_id": stops if len(stops) > 1 else stops[0]})


def copy_tokenizer(tokenizer_folder: Path, folder: Path) -> None:
    """Copy the tokenizer's files and chat template unchanged."""
    files = {file for pattern in _TOKENIZER_FILES for file in tokenizer_folder.glob(pattern) if file.is_file()}
    if not files:
        raise UserError(f"{tokenizer_folder} holds no tokenizer: give the folder that the tokenised data was made with")
    for file in sorted(files):
        with _writing(folder / file.name):
            shutil.copyfile(file, folder / file.name)


def write_training(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write training.json, which records how the model was trained."""
    write_json(folder / "training.json", facts)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with _writing(file):
        file.write_bytes(text.encode("utf-8", "backslashreplace"))  # escape names that are not UTF-8


def publish(scratch: Path, target: Path, *, overwrite: bool = False) -> None:
    """Move the finished folder `scratch` to `target` atomically. Both must be on the same file system."""
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists: give another folder, or remove it first")
    with _writing(scratch):
        _fsync_tree(scratch)
    with _writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    old = target.with_name(f".{target.name}.old.{os.getpid()}")
    has_old = target.exists()
    if has_old:
        with _writing(target):
            os.replace(target, old)
    try:
        with _writing(target):
            os.replace(scratch, target)
    except UserError:
        if has_old:
            os.replace(old, target)
        raise
    with _writing(target.parent):
        _fsync(target.parent)
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    elif has_old:
        old.unlink()


def _without_origins(content: dict[str, Any]) -> dict[str, Any]:
    """The configuration without settings that describe the base model's file or this process."""
    dropped = ("quantization_config", "_name_or_path", "_model_name_or_path")
    kept = {name: value for name, value in content.items() if name not in dropped and "attn_implementation" not in name}
    return {name: _without_origins(value) if isinstance(value, dict) else value for name, value in kept.items()}


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn errors such as a full disk or a missing permission into one line with the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or shorten(error, 120)
        remedy = "check free space and permissions, or give another folder"
        raise UserError(f"{path} cannot be written ({reason}): {remedy}") from error


def _fsync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _fsync(path)
    _fsync(folder)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
