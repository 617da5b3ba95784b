"""Compares what must be equal on all nodes of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from sft.config.settings import Settings
from sft.spec.run import RunSpec
from sft.spec.versions import versions

# These may differ between nodes: folders, and what only node 0 uses.
_MAY_DIFFER = (
    "rank",
    "nodes",
    "addr",
    "data",
    "val",
    "datasets",
    "val_datasets",
    "tokenized_data_dir",
    "checkpoint",
    "checkpoints_file",
    "save_checkpoint_dir",
    "no_autoaccept_iters",
    "retokenize",
    "append",
    "hostfile",
)
_COMPARED_VERSIONS = ("sft", "torch", "deepspeed", "transformers")


def facts_to_compare(spec: RunSpec | None, given: Settings) -> dict[str, str]:
    """The facts to compare, by name. `spec` is the run with this node's folders, or None if it cannot take part;
    `given` are the settings that this node was started with.
    """
    facts = {name: version for name, version in versions().items() if name in _COMPARED_VERSIONS}
    if spec is None:
        return facts
    shared = {name: value for name, value in given.as_json().items() if name not in _MAY_DIFFER}
    facts |= {"settings": _digest({**shared, "iters": spec.iterations}), "data": spec.data.fingerprint[:16]}
    facts |= {"validation data": "none" if spec.validation is None else spec.validation.fingerprint[:16]}
    return facts | {"base model": spec.base.fingerprint[:16], "layout": str(spec.layout)}


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
