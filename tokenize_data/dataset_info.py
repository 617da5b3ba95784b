"""Entries of LLaMA-Factory's `dataset_info.json`, named as `data/dataset_info.json:ENTRY`: which files, and how their
rows are read.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenize_data.columns import DEFAULTS, FORMATTINGS, Columns
from tokenize_data.dataset import DatasetSpec
from tokenize_data.errors import UserError, shorten

NAME = "dataset_info.json"
_ENTRY = re.compile(rf"(?P<file>(?:.*/)?{re.escape(NAME)})(?::(?P<name>.+))?")
_PLACES = ("file_name", "hf_hub_url", "cloud_file_name", "script_url", "ms_hub_url", "om_hub_url")
_KEYS = (*_PLACES, "formatting", "columns", "tags", "subset", "split", "num_samples", "folder", "ranking", "revision")
_OF_ALPACA = ("prompt", "query", "response", "history", "system", "tools")
_OF_TURNS = ("messages", "system", "tools")
_REJECTED = {
    "chosen": "preferences",
    "rejected": "preferences",
    "kto_tag": "preferences",
    "images": "pictures",
    "videos": "videos",
    "audios": "sound",
}
_MOST_LISTED = 8
_READ_BY_ENTRY = ("format", "columns", "question_key", "answer_key", "system_key", "text_key", "prompt", "answer")


def expanded(specs: Sequence[DatasetSpec]) -> tuple[DatasetSpec, ...]:
    """The same data sets, with one more for each entry that is named in place of a file."""
    return tuple(made for spec in specs for made in _expanded(spec))


def is_entry(name: str) -> bool:
    return _ENTRY.fullmatch(name) is not None


def entries_in(folder: Path) -> list[str]:
    """The names of a folder's entries; empty if its file of that name is another one, such as Hugging Face's."""
    try:
        content = json.loads((folder / NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    return sorted(content) if _is_ours(content) else []


def listing(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _MOST_LISTED else ""
    return ", ".join(sorted(names)[:_MOST_LISTED]) + more


def _is_ours(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(entry, dict) and any(place in entry for place in _PLACES) for entry in content.values())
    )


def _expanded(spec: DatasetSpec) -> list[DatasetSpec]:
    named = [(file, _ENTRY.fullmatch(file)) for file in spec.files]
    entries = [match for _, match in named if match is not None]
    if not entries:
        return [spec]
    if odd := [name for name in _READ_BY_ENTRY if getattr(spec, name) != getattr(DatasetSpec(files=("",)), name)]:
        raise UserError(f"{entries[0].group()} says how its rows are read: leave {odd[0]} out")
    if spec.samples is not None and len(named) > 1:
        raise UserError(f"samples {spec.samples} is for one data set, and there are {len(named)}: name one at a time")
    plain = tuple(file for file, match in named if match is None)
    found = [replace(spec, files=plain)] if plain else []
    return found + [_of_entry(spec, match["file"], match["name"]) for match in entries]


def _of_entry(spec: DatasetSpec, file: str, name: str | None) -> DatasetSpec:
    entries = _read(file)
    if name not in entries:
        close = difflib.get_close_matches(name or "", entries, n=1)
        hint = f"did you mean {file}:{close[0]}?" if close else f"write {file}:ENTRY with {listing(list(entries))}"
        what = f"has no entry '{name}'" if name else "names no entry"
        raise UserError(f"{file} {what}: {hint}")
    entry, where = {key: value for key, value in entries[name].items() if value is not None}, f"{file}: '{name}'"
    _check(entry, where)
    samples = entry.get("num_samples")
    return replace(
        spec,
        files=(_place(entry, Path(file).parent, where),),
        name=spec.name or str(name),
        columns=_columns(entry, where),
        samples=spec.samples if samples is None or spec.samples is not None else samples,
    )


def _read(file: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(file).expanduser().read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}: check the path given to --data") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({shorten(error, 120)}): correct it") from error
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise UserError(f"{file} is not LLaMA-Factory's: it must map names to objects with a file_name or a hf_hub_url")
    return content


def _check(entry: Mapping[str, Any], where: str) -> None:
    for key in entry:
        if key not in _KEYS:
            close = difflib.get_close_matches(key, _KEYS, n=1)
            raise UserError(f"{where}: unknown key '{key}'{f': did you mean {close[0]}?' if close else ''}")
    if entry.get("ranking"):
        raise UserError(f"{where} has ranking: true: preferences are not trained here, only answers")
    if entry.get("formatting", FORMATTINGS[0]) not in FORMATTINGS:
        raise UserError(f"{where}: formatting is {shorten(entry['formatting'])}: use one of {', '.join(FORMATTINGS)}")
    for key in ("columns", "tags"):
        values = entry.get(key, {})
        if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
            raise UserError(f"{where}: {key} is {shorten(values)}, not an object of texts")
    for key in entry.get("columns", {}):
        if key in _REJECTED:
            raise UserError(f"{where}: columns has {key}: {_REJECTED[key]} are not trained here, only texts")
    samples = entry.get("num_samples")
    if samples is not None and (type(samples) is not int or samples < 1):
        raise UserError(f"{where}: num_samples is {shorten(samples)}, not a whole number above 0")


def _place(entry: Mapping[str, Any], folder: Path, where: str) -> str:
    """The file, folder or Hub data set, as `--data` would name it."""
    for key in (*_PLACES, "subset", "split", "folder", "revision"):
        if entry.get(key) is not None and not isinstance(entry[key], str):
            raise UserError(f"{where}: {key} is {shorten(entry[key])}, not a text")
    if "hf_hub_url" in entry:
        for key in ("folder", "revision"):
            if entry.get(key):
                raise UserError(f"{where}: {key} is not supported: fetch {entry['hf_hub_url']}, and give a file_name")
        rest = [entry["subset"], entry.get("split", "train")] if entry.get("subset") else [entry.get("split")]
        return ":".join([entry["hf_hub_url"], *filter(None, rest)])
    if "file_name" in entry:
        return str(folder / entry["file_name"])
    if "cloud_file_name" in entry:
        return str(entry["cloud_file_name"])
    here = next((key for key in _PLACES if key in entry), None)
    what = f"has only a {here}" if here else "does not say where its rows are"
    raise UserError(f"{where} {what}: fetch the rows, and give it a file_name")


def _columns(entry: Mapping[str, Any], where: str) -> Columns:
    """As there: an entry that lists columns reads no others, and default names go where it lists none."""
    formatting = entry.get("formatting", FORMATTINGS[0])
    allowed = _OF_ALPACA if formatting == "alpaca" else _OF_TURNS
    listed = entry.get("columns")
    if listed is not None:
        if unknown := [key for key in listed if key not in allowed]:
            known = ", ".join(allowed)
            raise UserError(f"{where}: columns has {unknown[0]}, which {formatting} does not have: known are {known}")
        chosen = dict(listed)
        if formatting != "alpaca":
            chosen.setdefault("messages", DEFAULTS[formatting]["messages"])
    else:
        chosen = {key: value for key, value in DEFAULTS[formatting].items() if key in allowed}
    if formatting != "alpaca":
        defaults = {key: value for key, value in DEFAULTS[formatting].items() if key.endswith("_tag")}
        if unknown := [key for key in entry.get("tags", {}) if key not in defaults]:
            raise UserError(f"{where}: tags has {unknown[0]}: known are {', '.join(defaults)}")
        chosen |= defaults | entry.get("tags", {})
    try:
        return Columns(formatting=formatting, **chosen)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
