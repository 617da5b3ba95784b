"""Recipes: reads YAML files of settings, ours or another trainer's, and writes them."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sft.config import foreign
from sft.config.flags import WORDS
from sft.config.foreign import typed
from sft.config.settings import FIELDS, HINTS, RECIPE_KEYS, Settings, group_of
from tokenize_data.errors import UserError, shorten
from tokenize_data.recipe import dataset_values, parse_datasets
from tokenize_data.recipe_file import escaped, merge, parse_yaml, read_recipe_file
from tokenize_data.settings import plain_type

Warn = Callable[[str], None]
# Settings of this start and this machine, which a written recipe leaves out.
_NOT_WRITTEN = ("rank", "hostfile", "addr", "port", "retokenize", "append", "no_autoaccept_iters")
_RUN_FILE = "run.json"
_NONE: Mapping[str, Any] = MappingProxyType({})
_PLAIN = re.compile(r"[A-Za-z0-9_/.-]+")
_LOSS_MASKS = {"completion": 0.0, "full": 1.0}
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple: "a list of texts"}


def known_keys() -> list[str]:
    """The keys that a recipe may have."""
    return ["extends", *RECIPE_KEYS, *WORDS]


def read_recipe(file: Path, warn: Warn = lambda _: None, others: Mapping[str, Any] = _NONE) -> dict[str, Any]:
    """Read the settings of a recipe and of those that it extends. Another trainer's recipe is translated, with that
    trainer's flags `others` on top. run.json of an earlier run gives its settings.
    """
    if file.name == _RUN_FILE:
        typed.refuse(others)
        return _asked_by_run(file)

    def own(content: dict[str, Any], path: Path) -> dict[str, Any]:
        above = others if path == file else {}
        if foreign.is_foreign(content):
            typed.check(above)
            content = foreign.translated(content, path, warn, above)
        else:
            typed.refuse(above)
        return checked(content, str(path))

    return read_recipe_file(file, own)


def _asked_by_run(file: Path) -> dict[str, Any]:
    try:
        values = Settings.from_json(json.loads(file.read_bytes())["asked"])
    except OSError as error:
        raise UserError(f"--config {file}: {error.strerror}: give the path of a recipe or of a run.json") from error
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise UserError(f"--config {file} is not a run.json of this version ({shorten(error, 80)})") from error
    default = Settings.of(run_name=values.data.run_name)
    return {
        name: value for name, value in values.items() if name not in _NOT_WRITTEN and value != default.value(name)
    } | {"run_name": values.data.run_name}


def checked(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Convert each value to its field's type. A null stays: it unsets a value of an extended recipe."""
    known = known_keys()
    for key in content:
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}': {_suggestion(key, known)}")
    return values_of_fields(content, where)


def values_of_fields(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings and aliases by name, each value converted to its field's type."""
    values: dict[str, Any] = {}
    for key, value in content.items():
        if value is None:
            values[key] = None
        elif key == "chat_template_kwargs" and isinstance(value, Mapping):
            values[key] = json.dumps(value)
        elif key in ("datasets", "val_datasets"):
            values[key] = parse_datasets(value, f"{where}: {key}")
        elif key == "loss":
            values[key] = _one_of(value, tuple(_LOSS_MASKS), f"{where}: loss")
        else:
            values[key] = _coerced(value, bool if key in WORDS else plain_type(HINTS[key]), f"{where}: {key}")
    return values


def make_settings(values: Mapping[str, Any]) -> Settings:
    """Make Settings from typed or read values, by setting or alias."""
    values = {name: value for name, value in values.items() if value is not None and name != "config"}
    if values.pop("load_in_8bit", False):
        values["weight_only_8bit"] = True
    if "loss" in values:
        values["loss_mask"] = _LOSS_MASKS[values.pop("loss")]
    if "global_batch" in values and "gradient_accumulation" in values:
        raise UserError("--global_batch and --gradient_accumulation say the same in two ways: give one of them")
    if "run_name" not in values:
        raise UserError("--run_name is missing: it names the data set and the run, such as --run_name pubmedqa")
    return Settings.of(**values)


def recipe_text(settings: Settings) -> str:
    """All settings as a recipe that reads back to the same settings."""
    lines = ["# Every setting of this run; repeat it with `sft --config recipe.yaml`."]
    title = ""
    for name, value in settings.items():
        if name in _NOT_WRITTEN or value is None or value == () == FIELDS[name].default:
            continue
        if name == "global_batch" and settings.schedule.gradient_accumulation is not None:
            continue  # computed from gradient_accumulation
        if group_of(name) != title:
            title = group_of(name)
            lines += ["", f"# {title}"]
        if name in ("datasets", "val_datasets"):
            value = [dataset_values(spec) for spec in value]
        lines += key_lines(name, value)
    return "\n".join(lines) + "\n"


def key_lines(key: str, value: Any, comment: str = "") -> list[str]:
    """A recipe's key and value as YAML; long values take one line per item."""
    tail = f"  # {' '.join(comment.split())}" if comment else ""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        lines = [f"{key}:{tail}"]
        for item in value:
            inner = [f"{name}: {_yaml(part)}" for name, part in item.items()]
            lines += [f"  - {inner[0]}", *(f"    {line}" for line in inner[1:])]
        return lines
    return [f"{key}: {_yaml(value)}{tail}"]


def _yaml(value: Any) -> str:
    """Format a value as YAML: JSON, except for words that need no quotes."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and parse_yaml(value, "value") == value:
        return value
    if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        return f"[{', '.join(_yaml(part) for part in value)}]"
    text = json.dumps(escaped(value), ensure_ascii=False)
    return text.replace("e", ".0e") if isinstance(value, float) and "." not in text else text  # as YAML 1.1 requires


def _coerced(value: Any, kind: type, where: str) -> Any:
    if kind is tuple:
        parts = value if isinstance(value, list) else [value]
        return tuple(_coerced(part, str, where) for part in parts)
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # size: 70
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind in (int, float) and isinstance(value, str):
        try:
            return kind(value)  # quoted, or from a variable
        except ValueError:
            pass
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        hint = f': write it in quotes, as "{value}"' if kind is str and isinstance(value, float | bool) else ""
        raise UserError(f"{where} must be {_KINDS[kind]}, not {shorten(value)}{hint}")
    return value


def _one_of(value: Any, choices: tuple[str, ...], where: str) -> Any:
    if value not in choices:
        raise UserError(f"{where}: {shorten(value)}: use {' or '.join(choices)}")
    return value


def _suggestion(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean '{close[0]}'?" if close else "`sft train -h` lists all keys; they are the flags' names"


def combined(arguments_values: Mapping[str, Any], warn: Warn, others: Mapping[str, Any] = _NONE) -> dict[str, Any]:
    """The typed values on top of the recipe that they name. `others` are flags named like another trainer's keys."""
    file = arguments_values.get("config")
    if not file:
        typed.refuse(others)
        return dict(arguments_values)
    return merge(read_recipe(Path(file), warn, others), arguments_values)
