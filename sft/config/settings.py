"""All settings of a run, in groups by topic. Flags and recipe keys are field names without the group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields, replace
from typing import Any, get_type_hints

from sft.config.adapters import AdapterSettings
from sft.config.layout import LayoutSettings
from sft.config.machine import MachineSettings
from sft.config.model import ModelSettings
from sft.config.objective import ObjectiveSettings
from sft.config.optimizer import OptimizerSettings
from sft.config.output import OutputSettings
from sft.config.schedule import ScheduleSettings
from tokenize_data.columns import Columns
from tokenize_data.dataset import Cleaning, DatasetSpec
from tokenize_data.settings import DataSettings, Group, fields_of

GROUPS: dict[str, type[Group]] = {
    "data": DataSettings,
    "model": ModelSettings,
    "objective": ObjectiveSettings,
    "schedule": ScheduleSettings,
    "optimizer": OptimizerSettings,
    "adapters": AdapterSettings,
    "layout": LayoutSettings,
    "machine": MachineSettings,
    "output": OutputSettings,
}
FIELDS: dict[str, Field[Any]] = {entry.name: entry for group in GROUPS.values() for entry in fields_of(group)}
HINTS: dict[str, Any] = {name: hint for group in GROUPS.values() for name, hint in get_type_hints(group).items()}
# Settings that a recipe may have, since it is the same on all nodes.
RECIPE_KEYS = tuple(name for name, entry in FIELDS.items() if entry.metadata.get("recipe") is not False)
# Settings that must not change on resume: what is trained, on which data, in which order.
FIXED = tuple(name for name, entry in FIELDS.items() if entry.metadata.get("fixed"))
# (name, label) of the settings that appear in a run's folder name, in that order.
_PLACES = sorted((entry.metadata["suffix"], name) for name, entry in FIELDS.items() if "suffix" in entry.metadata)
SUFFIXES = tuple((name, label) for (_, label), name in _PLACES)
_GROUP_OF = {entry.name: title for title, group in GROUPS.items() for entry in fields_of(group)}
_DATASETS = ("datasets", "val_datasets")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings. In what the user asked for, None means "choose for me"; `resolve` replaces it."""

    data: DataSettings
    model: ModelSettings
    objective: ObjectiveSettings
    schedule: ScheduleSettings
    optimizer: OptimizerSettings
    adapters: AdapterSettings
    layout: LayoutSettings
    machine: MachineSettings
    output: OutputSettings

    @classmethod
    def of(cls, **values: Any) -> Settings:
        """Make settings from values by name; the others have their defaults."""
        unknown = values.keys() - FIELDS.keys()
        assert not unknown, unknown
        groups = {
            title: group(**{entry.name: values[entry.name] for entry in fields_of(group) if entry.name in values})
            for title, group in GROUPS.items()
        }
        return cls(**groups)  # type: ignore[arg-type]  # each group is made by its own class

    def replace(self, **values: Any) -> Settings:
        """A copy with these values changed."""
        changed: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            changed.setdefault(_GROUP_OF[name], {})[name] = value
        return replace(self, **{title: replace(getattr(self, title), **parts) for title, parts in changed.items()})

    def value(self, name: str) -> Any:
        return getattr(getattr(self, _GROUP_OF[name]), name)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Names and values of all settings."""
        for name in FIELDS:
            yield name, self.value(name)

    def as_json(self) -> dict[str, Any]:
        """Settings by name, as JSON types."""
        return {name: _as_json(value) for name, value in self.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Settings:
        return cls.of(**{name: _from_json(name, value) for name, value in values.items()})


def default_of(name: str) -> Any:
    entry = FIELDS[name]
    return None if entry.default is MISSING else entry.default


def defaults() -> dict[str, Any]:
    """Defaults as JSON types; required settings have None."""
    return {name: _as_json(default_of(name)) for name in FIELDS}


def group_of(name: str) -> str:
    return _GROUP_OF[name]


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [asdict(part) if isinstance(part, DatasetSpec) else part for part in value]
    return value


def _from_json(name: str, value: Any) -> Any:
    if name in _DATASETS:
        return tuple(_dataset(part) for part in value)
    return tuple(value) if isinstance(value, list) else value


def _dataset(values: Mapping[str, Any]) -> DatasetSpec:
    cleaning = Cleaning(**values["clean"])
    known = {entry.name for entry in fields(DatasetSpec)}
    assert values.keys() <= known, values
    columns = Columns(**values["columns"]) if values.get("columns") else None
    return DatasetSpec(**{**values, "files": tuple(values["files"]), "clean": cleaning, "columns": columns})
