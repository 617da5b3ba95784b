"""Selects and reads the rows to ask: as in training, unless flags or a recipe differ."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenize_data import manifest as manifests
from tokenize_data.dataset import DatasetSpec, reading_of
from tokenize_data.dataset_info import expanded, is_entry
from tokenize_data.errors import UserError
from tokenize_data.recipe import read_data

_KEYS = ("format", "question_key", "answer_key", "system_key", "text_key")
_FILLED = re.compile(r"(?<!\{)\{[^{}]+\}")


def specs_for(
    files: Sequence[str], typed: Mapping[str, Any], training: Mapping[str, Any], config: Path | None = None
) -> tuple[DatasetSpec, ...]:
    """One data set per file, or a recipe's. `typed` are the given flags; `training` is training.json."""
    recipe = read_data(config) if config is not None else None
    listed = (recipe.validation or recipe.training) if recipe is not None else ()
    if config is not None and not listed:
        raise UserError(f"--config {config} lists no data sets: write a datasets: list, or give files with --data")
    reading = {**_as_trained(training), **{key: typed[key] for key in _KEYS if typed.get(key) is not None}}
    if any(typed.get(key) is not None for key in ("question_key", "format")):
        for key in ("prompt", "columns"):  # they use other fields than those named now
            reading.pop(key, None)
    if typed.get("answer_key") is not None:
        reading.pop("answer", None)
    named = [
        DatasetSpec(files=(file,))  # which says by itself how its rows are read
        if is_entry(file)
        else DatasetSpec(files=(file,), name=Path(file).name.split(".")[0] or file, **reading)
        for file in files
    ]
    return tuple(_named_apart([*expanded([*named, *listed])]))


def system_message(training: Mapping[str, Any]) -> str | None:
    """The system message of all training rows; None if there was none or several."""
    found = {reading_of(dataset).get("system") for dataset in _datasets(training)}
    (only,) = found if len(found) == 1 else (None,)
    return only if isinstance(only, str) and not _FILLED.search(only) else None


def _as_trained(training: Mapping[str, Any]) -> dict[str, Any]:
    datasets = _datasets(training)
    if len(datasets) == 1:
        return reading_of(datasets[0])
    config = training.get("config") or {}
    return {key: config[key] for key in _KEYS if config.get(key) is not None}


def _datasets(training: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The data sets in the training data's manifest, if it still exists."""
    folder = (training.get("resolved") or {}).get("data_folder")
    if not isinstance(folder, str) or not Path(folder).is_dir():
        return []
    try:
        manifest = manifests.read(Path(folder))
    except UserError:
        return []
    return manifest.datasets if manifest is not None else []


def _named_apart(specs: Sequence[DatasetSpec]) -> list[DatasetSpec]:
    taken: set[str] = set()
    result = []
    for spec in specs:
        name, number = spec.name, 2
        while name in taken:
            name, number = f"{spec.name} {number}", number + 1
        taken.add(name)
        result.append(replace(spec, name=name))
    return result
