"""The `datasets:` and `val_datasets:` lists of a recipe: several data sets in one run, each read in its own way."""

from __future__ import annotations

import contextlib
import difflib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tokenize_data.columns import Columns
from tokenize_data.dataset import Cleaning, DatasetSpec
from tokenize_data.errors import UserError
from tokenize_data.recipe_file import read_recipe_file

_TYPES: dict[str, tuple[type, ...]] = {
    "files": (list, str),
    "weight": (int, float),
    "samples": (int,),
    "clean": (dict,),
    "columns": (dict,),
}
_CLEAN_TYPES: dict[str, tuple[type, ...]] = {"drop": (str,), "lower": (bool,), "strip": (bool,)}


@dataclass(frozen=True, kw_only=True)
class RecipeData:
    """The data stage's part of a recipe: its lists of data sets, and values for flags that were not typed."""

    training: tuple[DatasetSpec, ...]
    validation: tuple[DatasetSpec, ...]
    others: dict[str, Any]


def read_data(file: Path) -> RecipeData:
    """Read the data sets of a recipe; empty if it has none. Its other keys belong to training."""
    content = read_recipe_file(file)
    return RecipeData(
        training=parse_datasets(content.pop("datasets", None), f"{file}: datasets"),
        validation=parse_datasets(content.pop("val_datasets", None), f"{file}: val_datasets"),
        others=content,
    )


def parse_datasets(entries: Any, where: str) -> tuple[DatasetSpec, ...]:
    """Parse the value of `datasets:` or `val_datasets:`."""
    if entries is None:
        return ()
    if not isinstance(entries, list):
        raise UserError(f"{where} must be a list, one entry a data set, not {type(entries).__name__}")
    return tuple(parse_dataset(entry, f"{where}[{number}]", number) for number, entry in enumerate(entries))


def dataset_values(spec: DatasetSpec) -> dict[str, Any]:
    """A data set's values for a recipe: those that differ from the defaults."""
    plain = DatasetSpec(files=spec.files)
    values: dict[str, Any] = {"name": spec.name, "files": list(spec.files)}
    for entry in fields(DatasetSpec):
        value = getattr(spec, entry.name)
        if entry.name not in values and value != getattr(plain, entry.name):
            is_group = isinstance(value, Cleaning | Columns)
            values[entry.name] = {k: v for k, v in asdict(value).items() if v} if is_group else value
    return values


def parse_dataset(entry: Any, where: str, number: int) -> DatasetSpec:
    """Parse one entry of `datasets:`."""
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
    if "columns" in values:
        types: dict[str, tuple[type, ...]] = {field.name: (str,) for field in fields(Columns)}
        values["columns"] = Columns(**_typed(values["columns"], types, f"{where}: columns"))
    return DatasetSpec(**values)


def _typed(entry: dict[str, Any], types: dict[str, tuple[type, ...]], where: str) -> dict[str, Any]:
    entry = {key: _number(value, types.get(key, ())) for key, value in entry.items()}
    for key, value in entry.items():
        if key not in types:
            close = difflib.get_close_matches(str(key), types, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(types)}"
            raise UserError(f"{where}: unknown key '{key}': {hint}")
        if value is None:
            continue
        if not isinstance(value, types[key]) or (isinstance(value, bool) and bool not in types[key]):
            wanted = " or ".join(kind.__name__ for kind in types[key])
            raise UserError(f"{where}: {key} must be {wanted}, not {value!r}")
    return {key: value for key, value in entry.items() if value is not None}


def _number(value: Any, types: tuple[type, ...]) -> Any:
    """Parse a number, which is a string if it came from a variable."""
    if isinstance(value, str) and str not in types:
        for kind in types:
            with contextlib.suppress(ValueError, TypeError):
                return kind(value) if kind in (int, float) else value
    return value
