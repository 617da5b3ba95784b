"""Manifests that someone edited, of checkpoints (sealed again) and of tokenised data. A reader takes them, or says in a line why not."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft.checkpoint import manifest
from sft.checkpoint.commit import find_latest
from tests.faults.damages import make_checkpoint
from tests.real_parts import smollm2_tokenizer
from tokenize_data.cli import entry
from tokenize_data.errors import UserError
from tokenize_data.reader import ShardReader

_ROOT = Path(tempfile.mkdtemp(prefix="fuzz-manifests-"))
_STEP = make_checkpoint(_ROOT / "run", 4)
_SEALED = (_STEP / manifest.MANIFEST).read_bytes()
_WHOLE = {key: value for key, value in json.loads(_SEALED).items() if key not in ("sha256", "format")}
_DATA = _ROOT / "tokenized" / "r"

PREFIX = 1  # bytes before the JSON


def _tokenised() -> bytes:
    (_ROOT / "data.jsonl").write_text('{"prompt": "Is it?", "gold": "Yes."}\n' * 3)
    flags = ["--run_name", "r", "--data", str(_ROOT / "data.jsonl"), "--checkpoint", str(smollm2_tokenizer()), "--workers", "1"]
    assert entry([*flags, "--tokenized_data_dir", str(_DATA.parent)]) == 0
    return (_DATA / "manifest.json").read_bytes()


_TOKENISED = _tokenised()
_FIRST = _WHOLE["files"][0]
SEEDS = [b"d" + _SEALED, b"d{}", b"D{}", b"D" + json.dumps({"documents": -1, "batch_documents": 0, "shards": [], "id_type": "x"}).encode()]
SEEDS += [b"t" + _TOKENISED[:2000], b"D" + json.dumps({"tokenizer": {"fingerprint": 5}, "index": {"file": "../x"}}).encode()]
SEEDS += [
    b"c" + json.dumps(change).encode()
    for change in (
        {}, {"iteration": 4, "optimizer_step": -1}, {"layout": {}}, {"states": ["master", 5]}, {"facts": {}}, {"files": [_FIRST]},
        {"files": [{"name": "rank-00000-of-00001.safetensors", "bytes": 1, "sha256": "0"}]}, {"files": [{}]}, {"files": [5]},
    )
]  # fmt: skip


def one(data: bytes) -> None:
    kinds: dict[bytes, Callable[[bytes], None]] = {b"c": _changed_checkpoint, b"t": _whole_data, b"D": _changed_data}
    try:
        kinds.get(data[:1], _whole_checkpoint)(data[1:])
    except UserError as error:
        assert len(str(error)) < 5000, str(error)[:200]


def _whole_checkpoint(content: bytes) -> None:
    (_STEP / manifest.MANIFEST).write_bytes(content)
    _read_checkpoint()


def _changed_checkpoint(change: bytes) -> None:
    content = _changed(_WHOLE, change)
    if content is not None:
        try:
            sealed = manifest._sealed({"format": manifest.FORMAT, **content})
        except ValueError:
            return  # not JSON: NaN
        (_STEP / manifest.MANIFEST).write_bytes(sealed)
        _read_checkpoint()


def _read_checkpoint() -> None:
    found, _ = find_latest(_STEP.parent)
    if found is not None:
        assert found.iteration == 4
        for name in found.names():
            for state in found.states():
                found.read(name, state)


def _whole_data(content: bytes) -> None:
    (_DATA / "manifest.json").write_bytes(content)
    _read_data()


def _changed_data(change: bytes) -> None:
    content = _changed(json.loads(_TOKENISED), change)
    if content is not None:
        _whole_data(json.dumps(content).encode())


def _read_data() -> None:
    reader = ShardReader(_DATA)
    reader.verify()
    reader.manifest.fingerprint()
    assert len(reader.lengths) == len(reader)
    for number in range(min(len(reader), 3)):
        assert len(reader[number].ids) == reader.lengths[number]
        reader.place(number)


def _changed(whole: dict[str, Any], change: bytes) -> dict[str, Any] | None:
    """With other values at some keys; what is a mapping on both sides is changed key by key."""
    try:
        given = json.loads(change)
    except (ValueError, RecursionError):
        return None
    if not isinstance(given, dict):
        return None
    return {**whole, **{k: {**whole[k], **v} if isinstance(v, dict) and isinstance(whole.get(k), dict) else v for k, v in given.items()}}


def forget() -> None:
    shutil.rmtree(_ROOT, ignore_errors=True)
