"""Adapts a run that another node resolved to this node's folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sft.config.settings import Settings
from sft.resolve.base import find_base_model
from sft.resolve.naming import run_folder
from sft.spec.run import DataSet, RunSpec
from tokenize_data.manifest import dataset_folder
from tokenize_data.reader import ShardReader


def local_copy(spec: RunSpec, given: Settings) -> RunSpec:
    """Use the base model, shards and output folder that `given` names here. The launcher compares them."""
    base = find_base_model(given)
    root, name = Path(given.data.tokenized_data_dir), given.data.run_name
    data, validation = DataSet.of(ShardReader(dataset_folder(root, name))), None
    if spec.validation is not None:
        validation = DataSet.of(ShardReader(dataset_folder(root, f"{name}-val")))
    return replace(
        spec, base=base, data=data, validation=validation, folder=run_folder(given, base.family, base.is_entry)
    )
