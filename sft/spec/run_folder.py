"""run.toml and status.json: what a run is and how far it is. Only rank 0 writes them."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from tokenize_data.errors import UserError
from tokenize_data.files import replace_private

State = Literal["running", "preempted", "failed", "finished"]
STATES: tuple[str, ...] = get_args(State)

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}
_TO_ESCAPE = re.compile(r'["\\\x00-\x1f\x7f]')


def write_status(folder: Path, *, state: State, iteration: int, iterations: int, reason: str = "") -> None:
    """Write status.json atomically."""
    assert state in STATES, state
    status = {
        "state": state,
        "iteration": iteration,
        "iterations": iterations,
        "reason": reason.encode("utf-8", "backslashreplace").decode(),
        "updated": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    replace_file(folder / "status.json", json.dumps(status, ensure_ascii=False, indent=2) + "\n")


def read_status(folder: Path) -> dict[str, Any] | None:
    """The status; None if the file is missing or damaged."""
    try:
        status = json.loads((folder / "status.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    usable = (
        isinstance(status, dict)
        and status.get("state") in STATES
        and all(_is_count(status.get(k)) for k in ("iteration", "iterations"))
    )
    return status if usable else None


def is_finished(folder: Path) -> bool:
    """Whether the exported model exists, or the adapter in a LoRA run, which is written after a merged model."""
    return (folder / "adapter").is_dir() or ((folder / "hf").is_dir() and not trains_adapters(folder))


def result_of(folder: Path) -> Path | None:
    """The folder of a finished run's model or adapter; None if unfinished or without weights."""
    result = folder / ("adapter" if (folder / "adapter").is_dir() else "hf")
    return result if is_finished(folder) and any(result.glob("*.safetensors")) else None


def trains_adapters(folder: Path) -> bool:
    """Whether the run trains adapters, by run.toml; without that file it does not."""
    return "lora" in read_run_toml(folder).get("config", {})


def read_run_toml(folder: Path) -> dict[str, Any]:
    """The content of run.toml; empty if it is missing or damaged."""
    try:
        return tomllib.loads((folder / "run.toml").read_bytes().decode())
    except (OSError, ValueError, RecursionError):
        return {}


def write_run_toml(
    folder: Path, *, config: Mapping[str, Any], resolved: Mapping[str, Any], versions: Mapping[str, str]
) -> None:
    """Write run.toml. An older one with other values (versions aside) is kept as run-1.toml, run-2.toml, ..."""
    text = to_toml({"config": config, "resolved": resolved, "versions": versions})
    path = folder / "run.toml"
    if path.exists() and _differ(path, text):
        number = 1
        while (kept := folder / f"run-{number}.toml").exists():
            number += 1
        try:
            os.replace(path, kept)
        except OSError as error:
            raise UserError(
                f"cannot rename {path} to {kept.name}: {error.strerror}: check that the folder can be written"
            ) from error
    replace_file(path, text)


def replace_file(path: Path, text: str) -> None:
    """Replace a file atomically. Only its owner can read it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_private(path, text.encode("utf-8", "backslashreplace"), path.with_name(f".{path.name}.part"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}: check the folder and the free disk space") from error


def to_toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Format tables of strings, numbers, booleans, lists and tables as TOML, without values that are None."""
    return "\n".join(block for name, table in tables.items() for block in _blocks(_key(name), table))


def _blocks(name: str, table: Mapping[str, Any]) -> list[str]:
    """The table's own block, and one for each table in it."""
    filled = {key: value for key, value in table.items() if value is not None}
    plain = [f"{_key(key)} = {_value(value)}\n" for key, value in filled.items() if not isinstance(value, Mapping)]
    nested = [
        block
        for key, value in filled.items()
        if isinstance(value, Mapping)
        for block in _blocks(f"{name}.{_key(key)}", value)
    ]
    return [f"[{name}]\n" + "".join(plain), *nested]


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _string(key)


def _value(value: Any) -> str:
    value = value.item() if hasattr(value, "item") else value  # numpy's numbers have a repr of their own
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)  # nan, inf and 1e-05 are TOML too
    if isinstance(value, str | Path):
        return _string(str(value))
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{_key(key)} = {_value(item)}' for key, item in value.items() if item is not None)} }}"
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return f"[{', '.join(_value(item) for item in value)}]"
    raise TypeError(f"{type(value).__name__} has no place in run.toml")


def _string(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()  # a file name may hold half characters, TOML may not
    return '"' + _TO_ESCAPE.sub(lambda found: _ESCAPES.get(found[0]) or f"\\u{ord(found[0]):04x}", text) + '"'


def _differ(path: Path, text: str) -> bool:
    try:
        old, new = tomllib.loads(path.read_bytes().decode()), tomllib.loads(text)
    except (OSError, ValueError):
        return True
    return any(old.get(name) != new.get(name) for name in ("config", "resolved"))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
