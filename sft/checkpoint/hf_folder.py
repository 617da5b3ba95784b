"""A Hugging Face folder written piece by piece: every stage writes its own files, no process holds the whole model.

Each stage fills a ShardWriter in a folder that all of them see; then one process gives the files their names with
`finish`, adds configuration and tokenizer, and makes the folder visible under its own name with `publish`.
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
    """Writes one stage's tensors to files of at most `limit_bytes` (a single larger tensor gets a file to itself).

    Tensors on the CPU are not copied before they are written: leave them as they are until `close`.
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
        # A view would be written with all that it is a part of in memory, and safetensors refuses two of one storage.
        self._waiting[name] = plain.clone() if plain.untyped_storage().nbytes() != plain.nbytes else plain
        if self._num_bytes() >= self._limit:
            self._flush()

    @property
    def names(self) -> frozenset[str]:
        """Of what was added."""
        return frozenset(self._names)

    def close(self) -> list[dict[str, Any]]:
        """{file, names, bytes} of each file that was written."""
        if self._waiting:
            self._flush()
        return self._parts

    def _num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._waiting.values())

    def _flush(self) -> None:
        file = self._folder / f"part-{self._stage:04d}-{len(self._parts) + 1:04d}.safetensors"
        with _writing(file):
            save_file(self._waiting, file, metadata={"format": "pt"})
            file.chmod(0o644)  # safetensors lets nobody else read it
            _fsync(file)
        self._parts.append({"file": file.name, "names": list(self._waiting), "bytes": self._num_bytes()})
        self._waiting = {}


def finish(folder: Path, parts: Sequence[Mapping[str, Any]]) -> None:
    """Give the files of all stages the names that transformers looks for, and write their index where there are
    several.
    """
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
    """config.json and generation_config.json of the model as it was trained. The objects given are left as they are."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    config = copy.deepcopy(config)
    config.dtype = dtype
    config.get_text_config().vocab_size = vocabulary_size
    if config.model_type in CLASSES:
        config.architectures = [CLASSES[config.model_type]]
    write_json(folder / "config.json", _without_origins(config.to_diff_dict()))
    if generation_config is not None:
        # Its own save_pretrained refuses what many base models hold, such as a temperature without sampling.
        content = json.loads(generation_config.to_json_string())
        write_json(folder / "generation_config.json", _without_origins(content))


def stop_at_turns(folder: Path) -> None:
    """Let plain transformers, and servers that read the folder, stop where an answer ends: at the end of turn of the
    chat template.

    After `write_config` and `copy_tokenizer`. What the base's settings stop at stays.
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
    """The tokenizer's files and its chat template, as they are."""
    files = {file for pattern in _TOKENIZER_FILES for file in tokenizer_folder.glob(pattern) if file.is_file()}
    if not files:
        raise UserError(f"{tokenizer_folder} holds no tokenizer: give the folder that the tokenised data was made with")
    for file in sorted(files):
        with _writing(folder / file.name):
            shutil.copyfile(file, folder / file.name)


def write_training(folder: Path, facts: Mapping[str, Any]) -> None:
    """training.json: how the model came to be."""
    write_json(folder / "training.json", facts)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with _writing(file):
        file.write_bytes(text.encode("utf-8", "backslashreplace"))  # a name that is not UTF-8: JSON's own escape


def publish(scratch: Path, target: Path, *, overwrite: bool = False) -> None:
    """Make the finished folder `scratch` visible as `target`, whole or not at all. They have to lie on the same file
    system.
    """
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists: give another place, or remove it first")
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
    """Without what describes the base model's file, or this process, rather than the model."""
    dropped = ("quantization_config", "_name_or_path", "_model_name_or_path")
    kept = {name: value for name, value in content.items() if name not in dropped and "attn_implementation" not in name}
    return {name: _without_origins(value) if isinstance(value, dict) else value for name, value in kept.items()}


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A full disk, a lost right, another file system: said in one line, with the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or shorten(error, 120)
        remedy = "see that there is space and the right to write, or give another place"
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
