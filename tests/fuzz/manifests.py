"""Manifests of checkpoints that someone edited, as they are and sealed again. A reader takes them, or says in a line
why not.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from sft.checkpoint import manifest
from sft.checkpoint.commit import find_latest
from tests.faults.damages import make_checkpoint
from tests.fuzz.structure import changed
from tokenize_data.errors import UserError

PREFIX = 1  # bytes before the JSON
_STEP = make_checkpoint(Path(tempfile.mkdtemp(prefix="fuzz-manifests-")) / "run", 4)
_SEALED = (_STEP / manifest.MANIFEST).read_bytes()
_WHOLE = {key: value for key, value in json.loads(_SEALED).items() if key not in ("sha256", "format")}
SEEDS = [b"d" + _SEALED, b"d{}"]
SEEDS += [
    b"c" + json.dumps(change).encode()
    for change in (
        _WHOLE,
        {"iteration": 4, "optimizer_step": -1},
        {"layout": {}},
        {"states": ["master", 5]},
        {"facts": {}},
        {"files": [{}]},
        {"files": [{"name": "rank-00000-of-00001.safetensors", "bytes": 1, "sha256": "0"}]},
        {"files": [5]},
    )
]


def one(data: bytes) -> None:
    content = data[1:]
    if data[:1] == b"c":
        edited = changed(_WHOLE, content)
        if edited is None:
            return
        try:
            content = manifest._sealed({"format": manifest.FORMAT, **edited})
        except ValueError:
            return  # not JSON: NaN
    (_STEP / manifest.MANIFEST).write_bytes(content)
    try:
        found, _ = find_latest(_STEP.parent)
        if found is not None:
            assert found.iteration == 4
            for name in found.names():
                for state in found.states():
                    found.read(name, state)
    except UserError as error:
        assert len(str(error)) < 5000, str(error)[:200]
