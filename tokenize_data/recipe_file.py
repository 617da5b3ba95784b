"""Reads a recipe as a mapping: safe YAML of limited size, `extends`, `${VAR}`. The meaning of its keys is defined
elsewhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tokenize_data.errors import UserError

# Aliases: a later file's key replaces the other. Both in one file are an error.
RIVALS = (
    ("data", "datasets"),
    ("val", "val_datasets"),
    ("loss", "loss_mask"),
    ("global_batch", "gradient_accumulation"),
)
_MOST_BYTES, _MOST_VALUES, _MOST_FILES = 1 << 20, 100_000, 20
_VARIABLE = re.compile(r"\$(\$?)\{(\w+)(?::-([^}]*))?\}")

Translate = Callable[[dict[str, Any], Path], dict[str, Any]]


class _Loader(yaml.SafeLoader):
    """Loads numbers as in YAML 1.2: 2e-5 is a number; 070, 12:30 and 2024-01-01 are strings."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


def read_recipe_file(file: Path, translate: Translate | None = None, flag: str = "--config") -> dict[str, Any]:
    """Read all keys of a recipe, including those of files that it extends. `translate` receives each file's own
    keys.
    """
    return _read(file, translate or (lambda content, _: content), flag, ())


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Merge key by key: `upper` takes precedence, and its nulls remove keys."""
    gone = {key for key, value in upper.items() if value is None}
    for pair in RIVALS:
        gone |= set(pair) if any(upper.get(key) is not None for key in pair) else set()
    kept = {key: value for key, value in lower.items() if key not in gone}
    return kept | {key: value for key, value in upper.items() if value is not None}


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document, or raise a one-line UserError."""
    if len(text) > _MOST_BYTES:
        raise UserError(f"{where} has {len(text):,} characters, more than any recipe: at most {_MOST_BYTES:,}")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, where, {}, set())
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())[:300]}") from error
    except RecursionError as error:
        raise UserError(f"{where} is not valid YAML for a recipe: it is nested too deeply") from error
    finally:
        if loader is not None:
            loader.dispose()


def escaped(value: Any) -> Any:
    """Escape a value, so that a recipe written from it reads back the same."""
    if isinstance(value, str):
        return _VARIABLE.sub(lambda found: f"${found[0]}", value)
    if isinstance(value, Mapping):
        return {key: escaped(item) for key, item in value.items()}
    return [escaped(item) for item in value] if isinstance(value, list | tuple) else value


def expanded(value: Any, where: str) -> Any:
    """Expand ${VAR} and ${VAR:-default} from the environment; $${VAR} stays ${VAR}."""
    if isinstance(value, str):
        _refuse_odd(value, where)
        return _VARIABLE.sub(lambda found: _variable(found, where), value)
    if isinstance(value, dict):
        return {key: expanded(item, where) for key, item in value.items()}
    return [expanded(item, where) for item in value] if isinstance(value, list) else value


def _refuse_odd(text: str, where: str) -> None:
    """What neither a file's name nor a written recipe can hold. A name's bytes that are not UTF-8 are U+DC80 to U+DCFF
    in Python.
    """
    halves = (
        character for character in text if "\ud800" <= character <= "\udfff" and not "\udc80" <= character <= "\udcff"
    )
    odd = "\0" if "\0" in text else next(halves, None)
    if odd is not None:
        raise UserError(
            f"{where}: {text!r} has {'a NUL character' if odd == chr(0) else 'half of a surrogate pair'}: "
            "write the text again"
        )


def _variable(found: re.Match[str], where: str) -> str:
    dollar, name, otherwise = found.groups()
    if dollar:
        return found[0][1:]
    value = os.environ.get(name)
    if value is None and otherwise is None:
        raise UserError(
            f"{where}: ${{{name}}}: there is no such environment variable: export {name}=..., or write "
            f"${{{name}:-VALUE}}"
        )
    return value if value is not None and (value or otherwise is None) else otherwise or ""


def _read(file: Path, translate: Translate, flag: str, above: tuple[Path, ...]) -> dict[str, Any]:
    where = file.expanduser().resolve()
    if where in above:
        raise UserError(
            f"{file} extends itself ({' -> '.join(path.name for path in (*above, where))}): remove one 'extends'"
        )
    if len(above) >= _MOST_FILES:
        raise UserError(f"{file}: more than {_MOST_FILES} recipes extend each other: merge some of them")
    content = _content(file, flag)
    extended = content.pop("extends", None)
    names = [extended] if isinstance(extended, str) else [] if extended is None else extended
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file}: extends must be another recipe's path, not {extended!r}")
    lower: dict[str, Any] = {}
    for name in names:
        lower = merge(
            lower, _read(file.parent / Path(name).expanduser(), translate, f"{file}: extends", (*above, where))
        )
    own = translate(content, file)
    for pair in RIVALS:
        if all(own.get(key) is not None for key in pair):
            raise UserError(f"{file} has '{pair[0]}' and '{pair[1]}', which say the same in two ways: keep one of them")
    return merge(lower, own)


def _content(file: Path, flag: str) -> dict[str, Any]:
    try:
        if file.is_dir():
            raise UserError(f"{flag} {file}: is a directory: give the path of a YAML recipe")
        if file.exists() and not file.is_file():
            raise UserError(f"{flag} {file}: is not a regular file: give the path of a YAML recipe")
        if file.stat().st_size > _MOST_BYTES:
            raise UserError(
                f"{flag} {file} has {file.stat().st_size:,} bytes, more than any recipe: at most {_MOST_BYTES:,}"
            )
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{flag} {file}: {error.strerror}: give the path of a YAML recipe") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{flag} {file} is not valid YAML: {' '.join(str(error).split())}") from error
    content = parse_yaml(text, f"{flag} {file}")
    if not isinstance(content, dict):
        kind = "nothing" if content is None else type(content).__name__
        raise UserError(f"{flag} {file}: a recipe is a mapping of keys to values, not {kind}")
    for key in content:
        if not isinstance(key, str):
            raise UserError(f"{flag} {file}: the key {key!r} is not text: see the keys that `sft train -h` lists")
    found: dict[str, Any] = expanded(content, str(file))
    return found


def _count(node: yaml.Node, where: str, counts: dict[int, int], within: set[int]) -> int:
    """Count a node's values with aliases expanded: a small file may expand to more than fits into memory."""
    if id(node) in counts:
        return counts[id(node)]
    if id(node) in within:
        raise UserError(f"{where} is not valid YAML for a recipe: an anchor contains itself")
    within.add(id(node))
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _refuse_twice(node, where)
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = list(node.value)
    total = 1
    for part in parts:
        total += _count(part, where, counts, within)
        if total > _MOST_VALUES:
            raise UserError(f"{where} stands for more than {_MOST_VALUES:,} values: remove the repeated anchors")
    within.remove(id(node))
    counts[id(node)] = total
    return total


def _refuse_twice(node: yaml.MappingNode, where: str) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value != "<<":
            if key.value in seen:
                raise UserError(
                    f"{where}: '{key.value}' is given twice, again in line {key.start_mark.line + 1}: keep one"
                )
            seen.add(key.value)
