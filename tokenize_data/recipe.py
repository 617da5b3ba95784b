"""The `datasets:` list of a recipe: several data sets in one run, each read in its own way."""

from __future__ import annotations

import difflib
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from tokenize_data.errors import UserError
from tokenize_data.records import Cleaning, DatasetSpec

_TYPES: dict[str, tuple[type, ...]] = {
    "files": (list, str), "weight": (int, float), "samples": (int,), "clean": (dict,),
}  # fmt: skip
_CLEAN_TYPES: dict[str, tuple[type, ...]] = {"drop": (str,), "lower": (bool,), "strip": (bool,)}


def read_datasets(file: Path) -> tuple[DatasetSpec, ...]:
    """The data sets of a recipe, empty where it lists none. Other keys of the recipe belong to training."""
    try:
        content = yaml.safe_load(file.read_text())
    except OSError as error:
        raise UserError(f"--config {file}: {error.strerror}: give the path of a YAML recipe") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {file}: a recipe is a mapping of keys to values, not {type(content).__name__}")
    entries = content.get("datasets", [])
    if not isinstance(entries, list):
        raise UserError(f"{file}: datasets must be a list, one entry a data set, not {type(entries).__name__}")
    return tuple(parse_dataset(entry, f"{file}: datasets[{number}]", number) for number, entry in enumerate(entries))


def parse_dataset(entry: Any, where: str, number: int) -> DatasetSpec:
    """One entry of `datasets:`."""
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be a mapping with 'files', not {entry!r}")
    values = _typed(entry, {field.name: _TYPES.get(field.name, (str,)) for field in fields(DatasetSpec)}, where)
    if "files" not in values:
        raise UserError(f"{where} has no 'files': list the data set's files")
    files = [values["files"]] if isinstance(values["files"], str) else values["files"]
    if not all(isinstance(name, str) for name in files):
        raise UserError(f"{where}: files must be a list of paths, not {files!r}")
    values["files"] = tuple(files)
    values.setdefault("name", f"data set {number + 1}")
    if "clean" in values:
        values["clean"] = Cleaning(**_typed(values["clean"], _CLEAN_TYPES, f"{where}: clean"))
    return DatasetSpec(**values)


def _typed(entry: dict[str, Any], types: dict[str, tuple[type, ...]], where: str) -> dict[str, Any]:
    for key, value in entry.items():
        if key not in types:
            close = difflib.get_close_matches(str(key), types, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(types)}"
            raise UserError(f"{where}: unknown key '{key}': {hint}")
        if not isinstance(value, types[key]) or (isinstance(value, bool) and bool not in types[key]):
            wanted = " or ".join(kind.__name__ for kind in types[key])
            raise UserError(f"{where}: {key} must be {wanted}, not {value!r}")
    return dict(entry)
