"""checkpoints.toml: one entry per (checkpoint, size), or a path to a Hugging Face folder."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from tokenize_data.errors import UserError

ENTRY_KEYS = {"path": str, "tp": int, "pp": int, "intermediate": str, "add_tokens": list}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model: its location and the facts in its entry."""

    name: str
    path: str
    tp: int | None = None
    pp: int | None = None
    intermediate: str | None = None
    add_tokens: tuple[str, ...] = ()


def find_base(checkpoint: str, size: str | None, checkpoints_file: Path | None = None) -> Base:
    """Find the base model that `--checkpoint` and `--size` name; a path takes precedence over an entry."""
    folder = Path(checkpoint).expanduser()
    if os.sep in checkpoint or folder.is_dir():
        return _base_of_path(checkpoint, folder)
    file, table = read_checkpoints(checkpoints_file)
    sizes = table.get(checkpoint)
    if sizes is None:
        close = difflib.get_close_matches(checkpoint, table, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"it has {', '.join(sorted(table)) or 'none'}."
        raise UserError(
            f"{file} has no checkpoint '{checkpoint}' and no folder has that name: {hint} "
            "Give an entry's name or the path of a Hugging Face folder."
        )
    wanted = size if size is not None else "7"
    if wanted not in sizes:
        raise UserError(
            f"{file}: '{checkpoint}' has no size '{wanted}'; it has {', '.join(sizes)}: use --size with one"
        )
    return _base_of_entry(file, checkpoint, wanted, sizes[wanted])


def read_checkpoints(checkpoints_file: Path | None = None) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Returns (the file read, {checkpoint: {size: entry}}); ./checkpoints.toml takes precedence over the
    packaged one.
    """
    file = checkpoints_file or default_file()
    try:
        with file.open("rb") as stream:
            content = tomllib.load(stream)
    except OSError as error:
        raise UserError(f"--checkpoints_file {file}: {error.strerror}: give the path of a checkpoints.toml") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid TOML: {error}") from error
    table = {}
    for name, sizes in content.items():
        if name == "documents":
            continue
        if not isinstance(sizes, dict) or not all(isinstance(entry, dict) for entry in sizes.values()):
            raise UserError(f"{file}: [{name}] needs a size: write it as [{name}.7]")
        table[name] = {str(size): entry for size, entry in sizes.items()}
    return file, table


def known_documents(run_name: str, checkpoints_file: Path | None = None) -> int | None:
    """The number of documents of a data set in the [documents] table of checkpoints.toml."""
    file = checkpoints_file or default_file()
    try:
        with file.open("rb") as stream:
            count = tomllib.load(stream).get("documents", {}).get(run_name)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return None  # a base model may be a folder, which needs no such file
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise UserError(f"{file}: [documents] {run_name} = {count!r} must be a whole number above 0")
    return count


def default_file() -> Path:
    here = Path("checkpoints.toml")
    if here.exists():
        return here
    packaged = Path(str(resources.files("tokenize_data"))) / "checkpoints.toml"
    return packaged if packaged.exists() else packaged.parent.parent / "checkpoints.toml"


def _base_of_entry(file: Path, checkpoint: str, size: str, entry: dict[str, Any]) -> Base:
    where = f"{file}: [{checkpoint}.{size}]"
    for key, value in entry.items():
        if key not in ENTRY_KEYS:
            close = difflib.get_close_matches(key, ENTRY_KEYS, n=1)
            raise UserError(f"{where}: unknown key '{key}'" + (f", did you mean '{close[0]}'?" if close else ""))
        if not isinstance(value, ENTRY_KEYS[key]):
            raise UserError(f"{where}: {key} must be {ENTRY_KEYS[key].__name__}, not {value!r}")
    if "path" not in entry:
        raise UserError(f"{where}: 'path' is missing: a Hub id, a folder, or ${{VAR}}/folder")
    tokens = entry.get("add_tokens", [])
    if not all(isinstance(token, str) and token for token in tokens):
        raise UserError(f"{where}: add_tokens must be a list of texts, not {tokens!r}")
    return Base(
        name=checkpoint,
        path=_expand(entry["path"], where),
        tp=entry.get("tp"),
        pp=entry.get("pp"),
        intermediate=entry.get("intermediate"),
        add_tokens=tuple(tokens),
    )


def _base_of_path(given: str, folder: Path) -> Base:
    if folder.is_dir():
        if not any((folder / name).exists() for name in _TOKENIZER_FILES):
            raise UserError(
                f"--checkpoint {given}: the folder has no tokenizer ({', '.join(_TOKENIZER_FILES)}): "
                "give the folder that save_pretrained of model and tokenizer wrote"
            )
        return Base(name=folder.resolve().name, path=str(folder))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", given) and not given.startswith("."):
        return Base(name=given.split("/")[1], path=given)  # a Hub id: whether it exists shows when it is loaded
    raise UserError(f"--checkpoint {given}: no such folder: give a Hugging Face folder, a Hub id or an entry's name")


def _expand(path: str, where: str) -> str:
    missing = [name for name in re.findall(r"\$\{(\w+)\}", path) if name not in os.environ]
    if missing:
        raise UserError(f"{where}: path {path} needs the environment variable {missing[0]}: export it first")
    return os.path.expanduser(re.sub(r"\$\{(\w+)\}", lambda match: os.environ[match.group(1)], path))
