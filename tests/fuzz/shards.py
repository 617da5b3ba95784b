"""Manifests of tokenised data that someone edited. A reader takes them, or says in a line why not."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.fuzz.structure import changed
from tests.real_parts import smollm2_tokenizer
from tokenize_data.cli import entry
from tokenize_data.errors import UserError
from tokenize_data.reader import ShardReader

PREFIX = 1  # bytes before the JSON
_ROOT = Path(tempfile.mkdtemp(prefix="fuzz-shards-"))
_FOLDER = _ROOT / "tokenized" / "r"


def _tokenised() -> bytes:
    (_ROOT / "data.jsonl").write_text('{"prompt": "Is it?", "gold": "Yes."}\n' * 3)
    flags = [
        "--run_name",
        "r",
        "--data",
        str(_ROOT / "data.jsonl"),
        "--checkpoint",
        str(smollm2_tokenizer()),
        "--workers",
        "1",
    ]
    assert entry([*flags, "--tokenized_data_dir", str(_FOLDER.parent)]) == 0
    return (_FOLDER / "manifest.json").read_bytes()


_WHOLE = _tokenised()
SEEDS = [b"d" + _WHOLE, b"d{}", b"d" + b"[" * 3000, b"c" + _WHOLE]
SEEDS += [
    b"c" + json.dumps(change).encode()
    for change in (
        {"documents": -1},
        {"batch_documents": 0},
        {"shards": []},
        {"id_type": "x"},
        {"tokenizer": {"fingerprint": 5}},
        {"datasets": [5]},
        {"index": {"file": "../x"}},
    )
]


def one(data: bytes) -> None:
    content = data[1:]
    if data[:1] == b"c":
        edited = changed(json.loads(_WHOLE), content)
        if edited is None:
            return
        content = json.dumps(edited).encode()
    (_FOLDER / "manifest.json").write_bytes(content)
    try:
        _read()
    except UserError as error:
        assert len(str(error)) < 5000, str(error)[:200]


def _read() -> None:
    reader = ShardReader(_FOLDER, verify=True)
    reader.manifest.fingerprint()
    assert len(reader.lengths) == len(reader)
    for number in range(min(len(reader), 3)):
        assert len(reader[number].ids) == reader.lengths[number]
        reader.place(number)
