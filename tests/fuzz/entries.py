"""`dataset_info.json`: an entry becomes a data set, or is rejected in one line."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tokenize_data.dataset import DatasetSpec
from tokenize_data.dataset_info import NAME, entries_in, expanded
from tokenize_data.errors import UserError

_ENTRIES = [
    {"file_name": "a.json"},
    {"hf_hub_url": "me/data", "subset": "en", "split": "train", "num_samples": 5},
    {"file_name": "a.json", "columns": {"prompt": "q", "query": "i", "response": "a", "history": "h", "tools": "t"}},
    {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "m"}, "tags": {"role_tag": "who"}},
    {"cloud_file_name": "s3://x/y.jsonl", "formatting": "openai", "tags": {}},
    {"script_url": "x", "ranking": True},
]
SEEDS = [json.dumps({"e": entry}).encode() for entry in _ENTRIES]
SEEDS += [b"{}", b"[]", b'{"e": []}', b'{"e": {"columns": {"images": "i"}}}', b"\xff", b'{"e": {"file_name": NaN}}']
PREFIX = 0
_FOLDER = tempfile.TemporaryDirectory()


def one(data: bytes) -> None:
    file = Path(_FOLDER.name, NAME)
    file.write_bytes(data)
    entries_in(file.parent)
    try:
        (spec,) = expanded([DatasetSpec(files=(f"{file}:e",), weight=2.0)])
    except UserError as error:
        assert "\n" not in str(error), str(error)
        assert len(str(error)) < 2000 + len(_FOLDER.name), len(str(error))
        return
    assert spec.columns is not None
    assert len(spec.files) == 1
    assert spec.weight == 2.0
