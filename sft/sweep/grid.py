"""Expands sweep.yaml into trials: every combination of the axes that constraints and exclusions allow, each with a
complete recipe.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.config.recipe import Warn, checked, key_lines, known_keys, read_recipe
from sft.sweep.condition import holds
from tokenize_data.dataset import DatasetSpec
from tokenize_data.errors import UserError, shorten
from tokenize_data.names import check_run_name
from tokenize_data.recipe import dataset_values
from tokenize_data.recipe_file import merge, read_recipe_file

_KEYS = ("name", "base", "recipe", "axes", "constraints", "exclude", "retries", "parallel", "out", "after")
_ALIASES = {"model": "checkpoint"}
_SHARDS = (  # settings that determine the tokenised data
    "checkpoint",
    "size",
    "checkpoints_file",
    "intermediate_iter",
    "data",
    "val",
    "datasets",
    "val_datasets",
    "samples",
    "format",
    "question_key",
    "answer_key",
    "system_key",
    "text_key",
    "template",
    "seq",
    "truncate",
    "truncate_side",
    "max_bad_rows",
)
_MOST_TRIALS, _MOST_NAME = 10_000, 80


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run. `labels` has its value on each axis, `values` all of its settings."""

    number: int
    name: str
    labels: Mapping[str, Any]
    values: Mapping[str, Any]

    @property
    def recipe(self) -> str:
        """The recipe for `sft --config`."""
        lines = [f"# {', '.join(f'{axis} {label}' for axis, label in self.labels.items())}"]
        for key, value in self.values.items():
            is_list = isinstance(value, tuple) and value and isinstance(value[0], DatasetSpec)
            lines += key_lines(key, [dataset_values(spec) for spec in value] if is_list else value)
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The content of sweep.yaml."""

    name: str
    folder: Path
    axes: Mapping[str, Mapping[Any, Mapping[str, Any]]]  # axis -> label -> settings
    trials: tuple[Trial, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)  # reason -> number of trials
    retries: int = 1
    parallel: int = 1
    after: tuple[str, ...] = ()


def read_sweep(
    file: Path, *, out: Path | None = None, parallel: int | None = None, warn: Warn = lambda _: None
) -> Sweep:
    content = read_recipe_file(file, flag="sweep")
    for key in content:
        if key not in _KEYS:
            close = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(_KEYS)}"
            raise UserError(f"{file}: unknown key '{key}': {hint}")
    name = str(content.get("name", file.stem))
    check_run_name(name, "name")
    base = _base(content, file, warn)
    axes = _axes(content.get("axes"), file)
    folder = out or Path(str(content.get("out", Path("sweeps") / name)))
    trials, left_out = _trials(content, file, axes, base, name, folder)
    after = content.get("after", [])
    after = [after] if isinstance(after, str) else after
    if not isinstance(after, list) or not all(isinstance(line, str) for line in after):
        raise UserError(f"{file}: after must be a list of commands, such as sft evaluate {{model}} --data test.jsonl")
    for line in after:
        if not _words(line):
            raise UserError(
                f"{file}: after: {shorten(line)} is not a command: close its quotes, and write it as in a terminal"
            )
    return Sweep(
        name=name,
        folder=folder,
        axes=axes,
        trials=trials,
        left_out=left_out,
        retries=_count(content, "retries", 1, 0, file),
        parallel=parallel if parallel is not None else _count(content, "parallel", 1, 1, file),
        after=tuple(after),
    )


def _words(line: str) -> list[str]:
    """Split a command into words; none if it cannot be split."""
    try:
        return shlex.split(line) if "\0" not in line else []
    except ValueError:
        return []


def _base(content: Mapping[str, Any], file: Path, warn: Warn) -> dict[str, Any]:
    """The settings shared by all trials: the base recipe's, and those in sweep.yaml."""
    given, inner = content.get("base"), content.get("recipe", {})
    if given is not None and not isinstance(given, str):
        raise UserError(f"{file}: base must be a recipe's path, not {shorten(given)}; settings go under recipe")
    if not isinstance(inner, Mapping):
        raise UserError(f"{file}: recipe must be a mapping of settings, not {shorten(inner)}")
    base = read_recipe(file.parent / given, warn) if given is not None else {}
    return merge(base, checked(dict(inner), f"{file}: recipe"))


def _axes(given: Any, file: Path) -> dict[str, dict[Any, dict[str, Any]]]:
    if not isinstance(given, Mapping) or not given:
        raise UserError(
            f"{file}: axes must be a mapping, such as axes: {{loss: [completion, full], samples: [60, 120]}}"
        )
    if reserved := sorted({"trial", "state", "reason", "run"} & set(map(str, given))):
        raise UserError(f"{file}: axes: {reserved[0]} is a column of the result table: rename it")
    axes = {str(axis): _axis(str(axis), values, f"{file}: axes: {axis}") for axis, values in given.items()}
    count = 1
    for axis, values in axes.items():
        if not values:
            raise UserError(f"{file}: axes: {axis} has no values: list some, or take it out")
        count *= len(values)
    if count > _MOST_TRIALS:
        raise UserError(f"{file}: {count:,} combinations, more than {_MOST_TRIALS:,}: make it several sweeps")
    return axes


def _axis(axis: str, values: Any, where: str) -> dict[Any, dict[str, Any]]:
    """Parse an axis to {label: settings}, from a list of one key's values or a mapping of names to settings."""
    key = axis if axis in known_keys() else _ALIASES.get(axis)
    if isinstance(values, list):
        if key is None:
            close = difflib.get_close_matches(axis, known_keys(), n=1)
            hint = (
                f"did you mean '{close[0]}'?"
                if close
                else "or a name for settings: {small: {checkpoint: a}, big: {checkpoint: b}}"
            )
            raise UserError(f"{where}: a list of values needs one of the recipe's keys as the axis: {hint}")
        named = {_label(value): {key: value} for value in values}
        if len(named) < len(values):
            raise UserError(f"{where}: a value is listed twice: keep one")
    elif isinstance(values, Mapping):
        named = {}
        for label, settings in values.items():
            if isinstance(settings, Mapping):
                named[label] = dict(settings)
            elif key is not None:
                named[label] = {key: settings}
            else:
                raise UserError(f"{where}: {label} must be a mapping of settings, not {shorten(settings)}")
    else:
        raise UserError(f"{where} must be a list of values, or a mapping from names to settings, not {shorten(values)}")
    return {label: checked(settings, f"{where}: {label}") for label, settings in named.items()}


def _trials(
    content: Mapping[str, Any], file: Path, axes: Mapping[str, Any], base: dict[str, Any], name: str, folder: Path
) -> tuple[tuple[Trial, ...], dict[str, int]]:
    constraints = content.get("constraints") or []
    constraints = [constraints] if isinstance(constraints, str) else constraints
    excluded = content.get("exclude") or {}
    if not isinstance(constraints, list) or not all(isinstance(text, str) for text in constraints):
        raise UserError(f"{file}: constraints must be a list of conditions, such as samples >= 120 or loss == 'full'")
    if not isinstance(excluded, Mapping) or not all(
        isinstance(picks, Mapping) and picks for picks in excluded.values()
    ):
        raise UserError(f"{file}: exclude must map names to what they exclude, as in small: {{samples: 60}}")
    for what, picks in excluded.items():
        _check_picks(picks, axes, f"{file}: exclude: {what}")
    trials: list[Trial] = []
    left_out: dict[str, int] = {}
    for labels in itertools.product(*axes.values()):
        chosen = dict(zip(axes, labels, strict=True))
        values = base
        for axis, label in chosen.items():
            values = merge(values, axes[axis][label])
        known = {**dict.fromkeys(known_keys()), **values, **chosen}
        reasons = [text for text in constraints if not holds(text, known, f"{file}: constraints")]
        reasons += [str(what) for what, picks in excluded.items() if _is_picked(picks, chosen)]
        if reasons:
            left_out[reasons[0]] = left_out.get(reasons[0], 0) + 1
            continue
        trials.append(_trial(len(trials), chosen, values, name, folder))
    if not trials:
        raise UserError(f"{file}: constraints and exclusions leave no trial: {', '.join(left_out)}")
    if len({trial.name for trial in trials}) < len(trials):
        raise UserError(
            f"{file}: two trials have one name: give the values of an axis names of their own, as small: {{...}}"
        )
    return tuple(trials), left_out


def _trial(number: int, chosen: dict[str, Any], values: dict[str, Any], name: str, folder: Path) -> Trial:
    slug = "-".join(_slug(label) for label in chosen.values())
    if len(slug) > _MOST_NAME:
        slug = f"{slug[:_MOST_NAME]}-{_digest(slug)}"
    decides = {key: values[key] for key in _SHARDS if key in values}
    if values.get("samples") or any(spec.samples or spec.weight != 1 for spec in values.get("datasets", ())):
        decides["seed"] = values.get("seed")
    own = {
        "run_name": f"{values.get('run_name', name)}-{_digest(repr(sorted(decides.items())))}",
        "tokenized_data_dir": values.get("tokenized_data_dir", str(folder / "tokenized")),
        "save_checkpoint_dir": str(folder / "runs" / slug),
    }
    return Trial(number=number, name=slug, labels=chosen, values={**values, **own})


def _check_picks(picks: Mapping[str, Any], axes: Mapping[str, Any], where: str) -> None:
    for axis, wanted in picks.items():
        if axis not in axes:
            raise UserError(f"{where}: there is no axis '{axis}': known are {', '.join(axes)}")
        for label in wanted if isinstance(wanted, list) else [wanted]:
            if isinstance(label, list | dict) or label not in axes[axis]:
                raise UserError(
                    f"{where}: {axis} has no value {shorten(label)}: it has {', '.join(map(str, axes[axis]))}"
                )


def _is_picked(picks: Mapping[str, Any], chosen: Mapping[str, Any]) -> bool:
    return all(chosen[axis] in (wanted if isinstance(wanted, list) else [wanted]) for axis, wanted in picks.items())


def _label(value: Any) -> Any:
    if isinstance(value, list):
        return "+".join(Path(str(part)).stem for part in value)
    return value if not isinstance(value, Mapping) else json.dumps(value, sort_keys=True)


def _slug(label: Any) -> str:
    text = Path(label).name if isinstance(label, str) and "/" in label else str(label)
    return re.sub(r"[^A-Za-z0-9._]+", "_", text).strip("._") or "x"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _count(content: Mapping[str, Any], key: str, default: int, least: int, file: Path) -> int:
    value = content.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{file}: {key} must be a whole number of at least {least}, not {shorten(value)}")
    return value
