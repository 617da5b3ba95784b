"""A tokenizer's files, which may be hostile: read up to a size limit, checked, and tried in a process that may be
killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers import __version__ as tokenizers_version

from tokenize_data import guard
from tokenize_data.errors import UserError, shorten

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_TEMPLATE_BYTES = 1 << 20
_MAX_JSON_BYTES = 1 << 29
_MAX_ID = (1 << 24) - 1  # tables have as many rows as the largest id; the largest vocabularies have a million tokens
_TRIED = (
    "".join(map(chr, range(32, 127))),
    "The first treatment. " * 20,
    "a" * 200,
    " \n\t\r\n  ",
    "caf\u00e9 e\u0301 \u65e5\u672c \U0001f642 \u09dc",
)


def read_template(file: Path) -> str:
    with file.open("rb") as stream:  # devices report no size
        content = stream.read(_MAX_TEMPLATE_BYTES + 1)
    if len(content) > _MAX_TEMPLATE_BYTES:
        raise UserError(
            f"{file} has more than {_MAX_TEMPLATE_BYTES:,} bytes, so it is no chat template: give another one"
        )
    return content.decode()


def chat_template_of(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return read_template(file)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise UserError(f"{file} cannot be read ({reason}): fetch the base model again, or remove it") from error
    template = config.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several named templates: the default one is for chat
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise UserError(
            f"{folder}: chat_template is {shorten(template)}, not text: fetch the base model again, or remove it"
        )
    if template is not None and len(template) > _MAX_TEMPLATE_BYTES:
        raise UserError(
            f"{folder}: chat_template has more than {_MAX_TEMPLATE_BYTES:,} characters: fetch the base model again"
        )
    return template


def read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        size = file.stat().st_size if file.is_file() else 0
        if not 0 < size <= _MAX_JSON_BYTES:
            raise ValueError(f"{size:,} bytes, where at most {_MAX_JSON_BYTES:,} are read" if size else "no text in it")
        content = json.loads(file.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"it is {shorten(content)}, where {{...}} is needed")
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}): fetch the base model again") from error
    return content


def load(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{file} cannot be read ({error}): save the tokenizer again with save_pretrained") from error


def try_once(file: Path) -> None:
    """Load and use a tokenizer in a process that may be killed, before loading it here. Success is remembered."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}): save the tokenizer again with save_pretrained"
        ) from error
    digest = hashlib.sha256(f"{tokenizers_version} {_MAX_ID} {_TRIED}".encode() + content).hexdigest()
    mark = cache() / "tried" / digest
    if os.path.exists(mark):  # also False if the home cannot be read
        return
    child = guard.Child(
        _use, guard.Limits(seconds=60 + len(content) // 500_000, num_bytes=(2 << 30) + 64 * len(content))
    )
    try:
        child.ask(str(file))
    except guard.LimitError as error:
        raise UserError(
            f"{file} is not a usable tokenizer: it {error}, when it was tried: use another base model"
        ) from error
    finally:
        child.close()
    with contextlib.suppress(OSError):  # a read-only home: tried again each time
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _use(file: str) -> str:
    backend = load(Path(file))
    token, largest = max(backend.get_vocab(with_added_tokens=True).items(), key=lambda pair: pair[1], default=("", 0))
    if largest > _MAX_ID:
        raise UserError(
            f"{file} gives {shorten(token)} the id {largest:,}, above {_MAX_ID:,}: save the tokenizer again with "
            "save_pretrained"
        )
    for text in _TRIED:
        try:
            backend.decode(backend.encode(text, add_special_tokens=False).ids)
            backend.encode(text, add_special_tokens=True)
        except Exception as error:
            if (
                type(error) is not Exception
            ):  # `tokenizers` raises that for an unknown character, which concerns the rows that have it
                raise
    json.loads(backend.to_str())
    return ""


def check(folder: Path, config: dict[str, Any]) -> None:
    """Raise UserError if a value in a configuration has the wrong type."""
    tokens: list[tuple[str, Any]] = [(name, config.get(name)) for name in SPECIAL_NAMES]
    for name, kinds in (
        ("added_tokens_decoder", dict),
        ("extra_special_tokens", (list, dict)),
        ("additional_special_tokens", (list, dict)),
    ):
        values = config.get(name) or {}
        if not isinstance(values, kinds):
            raise UserError(
                f"{folder}: {name} is {shorten(values)}, not a list of tokens: correct tokenizer_config.json"
            )
        tokens += [(name, value) for value in (values.values() if isinstance(values, dict) else values)]
    for name, token in tokens:
        text = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(text, str):
            raise UserError(
                f"{folder}: {name} is {shorten(token)}, not the text of a token: correct tokenizer_config.json"
            )


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sft"
