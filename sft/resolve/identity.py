"""Checks that a folder belongs to this run. Two runs can have the same name; the second must not resume or reuse the
first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft.config.settings import SUFFIXES, Settings
from sft.resolve.naming import name_of
from sft.spec import run_folder
from sft.spec.run import RunSpec
from tokenize_data.errors import UserError

# The settings in a folder's name. Others, such as iterations, layout, intervals and --keep, may change between starts.
_NAMED = ("checkpoint", "size", "run_name", "intermediate_iter", *(name for name, _ in SUFFIXES), "id")
_CONTENT = {"base_fingerprint": "base", "data": "data"}


def refuse_another(spec: RunSpec) -> None:
    """Raise UserError if run.toml says that the folder belongs to another run. Keys that older releases did not write
    are ignored.
    """
    table = run_folder.read_run_toml(spec.folder)
    there, resolved = table.get("config"), table.get("resolved")
    if not isinstance(there, dict) or not isinstance(resolved, dict):
        return
    here = spec.asked.as_json()
    there = {**Settings.of(run_name=spec.asked.data.run_name).as_json(), **there}
    found: list[tuple[str, Any, Any]] = []
    if _was_named_by(there, spec.folder):
        found += [
            (name, there[name], here[name]) for name in _NAMED if _plain(name, there[name]) != _plain(name, here[name])
        ]
    if _holds_something(spec.folder):
        mine = spec.facts()
        found += [
            (label, resolved[name], mine[name])
            for name, label in _CONTENT.items()
            if name in resolved and resolved[name] != mine[name]
        ]
    if found:
        was = " and ".join(f"{name} {_short(value)}" for name, value, _ in found)
        now = " and ".join(f"{name} {_short(value)}" for name, _, value in found)
        raise UserError(
            f"{spec.folder} belongs to another run: it was made with {was}, this run has {now}: use the same, or "
            "start another run with --id"
        )


def _was_named_by(there: Mapping[str, Any], folder: Path) -> bool:
    """Whether the folder's name follows from these settings, and so was not copied or renamed by hand."""
    try:
        return folder.name.endswith(f"-{name_of(there)}")
    except (KeyError, TypeError, ValueError):
        return False


def _holds_something(folder: Path) -> bool:
    return run_folder.is_finished(folder) or any(folder.glob("step-*"))


def _plain(name: str, value: Any) -> Any:
    """Normalise spellings. Whether the base is another one is decided by its fingerprint."""
    if name == "checkpoint":
        return Path(str(value)).name
    return (value or "7") if name == "size" else value


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:16]}..."
