"""Translates the data sets of other trainers' recipes: Hub data sets with their splits, or local ones."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft.config.foreign.rules import Line, mapped, number, refused, warned

_LOCAL = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".zst", ".arrow")


def is_evaluated(recipe: Mapping[str, Any]) -> bool:
    strategy = recipe.get("eval_strategy", recipe.get("evaluation_strategy"))
    if strategy is False or strategy == "no":  # YAML reads `no` as false
        return False
    return bool(recipe.get("do_eval")) or strategy is not None


def mixer(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    """alignment-handbook's dataset_mixer: {name: fraction}, with dataset_splits and dataset_configs."""
    splits, configs = recipe.get("dataset_splits") or ["train", "test"], recipe.get("dataset_configs")
    if not isinstance(value, Mapping) or not all(
        isinstance(part, int | float) and part >= 0 for part in value.values()
    ):
        return refused(key, value, "must map data sets to fractions")
    if not isinstance(splits, list) or (
        configs is not None and (not isinstance(configs, list) or len(configs) != len(value))
    ):
        return refused(
            key, value, "dataset_splits must be a list, and dataset_configs a list with one entry for each data set"
        )
    neither = [split for split in splits if "train" not in str(split) and "test" not in str(split)]
    if neither:
        return refused(
            "dataset_splits", splits, f"{neither[0]} names neither a train nor a test split: list them under datasets"
        )
    named = [
        (name, float(share), config)
        for (name, share), config in zip(value.items(), configs or [None] * len(value), strict=True)
        if share
    ]
    train = [
        _entry(recipe, name, config, split, share)
        for name, share, config in named
        for split in splits
        if "train" in str(split)
    ]
    test = [
        _entry(recipe, name, config, split, 1.0)
        for name, _, config in named
        for split in splits
        if "train" not in str(split)
    ]
    ours: dict[str, Any] = {"datasets": train}
    if test and is_evaluated(recipe):
        ours["val_datasets"] = test
    return mapped(
        key,
        value,
        ours,
        "fractions as weights: rows are drawn by seed; test splits are read whole" + _unused(test, recipe),
    )


def mixture(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    """TRL's dataset_mixture: {datasets: [{id, config, split, columns, weight}], seed, test_split_size}."""
    entries = value.get("datasets") if isinstance(value, Mapping) else None
    if not isinstance(entries, list) or not all(
        isinstance(entry, Mapping) and ("id" in entry or "path" in entry) for entry in entries
    ):
        return refused(key, value, "must have datasets, a list of mappings with id")
    if value.get("test_split_size"):
        return refused(key, value, "test_split_size: make a file of the rows for validation, and name it as val")
    known = {"id", "path", "config", "name", "split", "columns", "weight"}
    if other := sorted({str(name) for entry in entries for name in entry} - known):
        return refused(key, value, f"{other[0]} of a data set is not known here: list the data sets under datasets")
    found = [
        _entry(
            recipe,
            entry.get("id", entry.get("path")),
            entry.get("config", entry.get("name")),
            entry.get("split", "train"),
            number("weight", entry.get("weight") or 1.0),
        )
        for entry in entries
    ]
    if any(entry.get("columns") for entry in entries):
        return warned(
            key, value, "columns: the keys of a row's format are used, others are ignored", {"datasets": found}
        )
    return mapped(key, value, {"datasets": found}, "rows are drawn by seed")


def named(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    """dataset_name, with its configuration and splits."""
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in names):
        return refused(key, value, "must be the name of a data set")
    config = recipe.get("dataset_config", recipe.get("dataset_config_name"))
    train, test = recipe.get("dataset_train_split") or "train", recipe.get("dataset_test_split") or "test"
    ours: dict[str, Any] = {"datasets": [_entry(recipe, name, config, train, 1.0) for name in names]}
    if is_evaluated(recipe):
        if any(_is_local(name) for name in names):
            return refused(key, value, "a local data set has no test split here: name the rows for validation as val")
        ours["val_datasets"] = [_entry(recipe, name, config, test, 1.0) for name in names]
    return mapped(key, value, ours, "owner/name:configuration:split")


def truncation(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    """Translate truncation_side and truncation_mode: which end of a long text is kept."""
    if recipe.get("max_prompt_length") is not None:
        return mapped(key, value, {}, "see max_prompt_length")
    if value in ("right", "keep_start"):
        return mapped(key, value, {"truncate": "right"})
    if value in ("left", "keep_end"):
        return warned(
            key,
            value,
            "only the longest question loses its beginning, so that all answers stay",
            {"truncate": "question", "truncate_side": "start"},
        )
    return refused(key, value, "use right or left (keep_start or keep_end)")


def prompt_length(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    """Translate max_prompt_length: prompts of long documents lose their beginning unless truncation_mode differs."""
    kept = recipe.get("truncation_mode", recipe.get("truncation_side"))
    side = "end" if kept in ("keep_start", "right") else "start"
    return warned(
        key,
        value,
        "a question is shortened only if its document is longer than seq, by as much as needed",
        {"truncate": "question", "truncate_side": side},
    )


def _entry(recipe: Mapping[str, Any], name: str, config: Any, split: Any, share: float) -> dict[str, Any]:
    parts = [str(part) for part in (name, config, split) if part]
    entry: dict[str, Any] = {
        "name": f"{Path(name).name} {split}",
        "files": [name if _is_local(name) else ":".join(parts)],
    }
    if share != 1.0:
        entry["weight"] = share
    column = recipe.get("dataset_text_field", recipe.get("text_column"))
    if column and column != "text":
        entry["text_key"] = str(column)
    return entry


def _is_local(name: str) -> bool:
    if name.startswith(("/", "./", "../", "~")) or name.endswith(_LOCAL):
        return True
    with contextlib.suppress(OSError, ValueError):  # not a valid file name
        return Path(name).exists()
    return False


def _unused(test: list[Any], recipe: Mapping[str, Any]) -> str:
    return (
        "; no test split is read, as eval_strategy asks for no evaluation" if test and not is_evaluated(recipe) else ""
    )
