"""The JSON schema of recipes, for completion and checks in editors. `python -m sft.config.schema` prints it."""

from __future__ import annotations

import json
import sys
import types
import typing
from dataclasses import MISSING, fields
from typing import Any

from sft.config.flags import WORDS
from sft.config.settings import FIELDS, HINTS, RECIPE_KEYS
from tokenize_data.columns import FORMATTINGS, Columns
from tokenize_data.dataset import FORMATS, SIDES, TRUNCATIONS, Cleaning, DatasetSpec
from tokenize_data.settings import plain_type

_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}
_DATASET_TEXTS = {
    "files": "files, folders, or Hub data sets (owner/name:configuration:split)",
    "name": "for messages and reports",
    "format": "of the rows (default: from the first ones)",
    "question_key": "key of the question, or a path: question.text",
    "answer_key": "key of the answer, or a path: answers.text[0]",
    "system_key": "key of the system message",
    "text_key": "key of plain text rows",
    "prompt": "the question, with {key} or {key.inner[0]} for a row's fields",
    "answer": "the answer, with {key} or {key.inner[0]} for a row's fields",
    "system": "the system message, with {key} or {key.inner[0]} for a row's fields",
    "weight": "0.5 takes half of the rows, 2 each of them twice",
    "weight_key": "key of a row's own weight, which means the same",
    "train_on": "assistant turns that are trained: all, last, or those whose `name` is listed",
    "truncate": "documents longer than seq (default: as the recipe's truncate)",
    "truncate_side": "where truncate: question shortens a text (default: as the recipe's truncate_side)",
    "samples": "number of rows to take, drawn by seed",
    "clean": "what is done to a row's texts",
    "drop": "a regular expression of what is removed",
    "lower": "in small letters",
    "strip": "without white space around",
    "columns": "keys of rows of no known format, as in LLaMA-Factory's dataset_info.json",
    "formatting": "alpaca, sharegpt or openai",
    "query": "key of what is put below the prompt",
    "response": "key of the answer",
    "history": "key of earlier turns, a list of pairs",
    "messages": "key of the list of messages",
    "tools": "key of the tools",
    "role_tag": "key of a message's role",
    "content_tag": "key of a message's text",
    "user_tag": "the user's role",
    "assistant_tag": "the assistant's role",
    "observation_tag": "the role of a tool's result",
    "function_tag": "the role of a call",
    "system_tag": "the role of the system message",
}
_KEY_TEXTS = {"prompt": "key of the question", "system": "key of the system message"}  # in `columns`


def schema() -> dict[str, Any]:
    properties: dict[str, Any] = {
        "extends": {
            "description": "another recipe, or several, whose keys hold where this one has none",
            **_either("string"),
        }
    }
    for name in RECIPE_KEYS:
        entry, known = FIELDS[name], FIELDS[name].metadata
        if entry.name in ("datasets", "val_datasets"):
            properties[entry.name] = {
                "description": known["text"],
                "type": ["array", "null"],
                "items": {"$ref": "#/$defs/dataset"},
            }
            continue
        default = {} if entry.default in (MISSING, None, ()) else {"default": entry.default}
        limits = {
            word: known[name]
            for name, word in (("least", "minimum"), ("above", "exclusiveMinimum"), ("most", "maximum"))
            if name in known
        }
        choices = {"enum": [*known["choices"], None]} if known.get("choices") else {}
        properties[entry.name] = {
            "description": known["text"],
            **_kind(plain_type(HINTS[entry.name]), *(["object"] if name == "chat_template_kwargs" else [])),
            **limits,
            **choices,
            **default,
        }
    for name, (_, text, options) in WORDS.items():
        properties[name] = {
            "description": text,
            **({"enum": [*options["choices"], None]} if "choices" in options else _kind(bool)),
        }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of sft",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "$defs": {"dataset": _dataset()},
    }


def text() -> str:
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def _dataset() -> dict[str, Any]:
    inner = _of(DatasetSpec)
    inner["properties"]["files"] = {"description": _DATASET_TEXTS["files"], **_either("string")}
    for name, choices in (("format", FORMATS), ("truncate", TRUNCATIONS), ("truncate_side", SIDES)):
        inner["properties"][name]["enum"] = [*choices, None]
    groups: tuple[tuple[str, type[Cleaning] | type[Columns]], ...] = (("clean", Cleaning), ("columns", Columns))
    for name, group in groups:
        inner["properties"][name] = {"description": _DATASET_TEXTS[name], **_of(group), "type": ["object", "null"]}
    inner["properties"]["columns"]["properties"]["formatting"]["enum"] = list(FORMATTINGS)
    return {**inner, "required": ["files"]}


def _of(kind: type[DatasetSpec] | type[Cleaning] | type[Columns]) -> dict[str, Any]:
    hints, texts = typing.get_type_hints(kind), _DATASET_TEXTS | (_KEY_TEXTS if kind is Columns else {})
    properties: dict[str, Any] = {}
    for entry in fields(kind):
        hint = hints[entry.name]
        properties[entry.name] = {
            "description": texts[entry.name],
            **(_kind(plain_type(hint)) if _is_simple(hint) else {}),
        }
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _is_simple(hint: Any) -> bool:
    return hint in _TYPES or (isinstance(hint, types.UnionType) and plain_type(hint) in _TYPES)


def _kind(kind: type, *further: str) -> dict[str, Any]:
    """Numbers may come from a variable, so they may be strings; null unsets a value of an extended recipe."""
    if kind is tuple:
        return _either("string")
    return {"type": sorted({_TYPES[kind], "string", "null", *(["integer"] if kind is str else []), *further})}


def _either(kind: str) -> dict[str, Any]:
    return {"anyOf": [{"type": [kind, "null"]}, {"type": "array", "items": {"type": kind}}]}


if __name__ == "__main__":
    sys.stdout.write(text())
