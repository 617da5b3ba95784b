"""Other trainers' keys as flags: accepted beside such a recipe, otherwise refused with the name of our flag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sft.config.foreign import flat
from sft.config.foreign.rules import Kind, Line, comment_on, own_keys
from tokenize_data.errors import UserError, did_you_mean
from tokenize_data.recipe_file import parse_yaml

_FILES = {"datasets": "data", "val_datasets": "val"}  # keys without an equivalent flag, and the closest flag


def values_of(words: Sequence[str]) -> dict[str, Any]:
    """Parse values by key from words such as `--learning_rate=1e-5 --num_train_epochs 2`."""
    texts: dict[str, list[str]] = {}
    key = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, is_given, value = word[2:].partition("=")
            key = name.replace("-", "_")
            if key in own_keys():
                raise UserError(f"unrecognized arguments: {word}: did you mean --{key}?")
            texts[key] = [value] if is_given else []
        elif key is None:
            raise UserError(f"unrecognized arguments: {word}: a recipe comes first, and each flag begins with --")
        else:
            texts[key].append(word)
    return {key: _value(parts) for key, parts in texts.items()}


def check(values: Mapping[str, Any]) -> None:
    """Beside a foreign recipe: refuse keys that no trainer knows."""
    unknown = [key for key in values if key not in flat.RULES]
    if unknown:
        raise UserError(_unknown(unknown[0], values[unknown[0]]))


def refuse(values: Mapping[str, Any]) -> None:
    """Without a foreign recipe: refuse the key and name our flag."""
    check(values)
    for key, value in values.items():
        line = comment_on(flat.TRAINER, key, values)
        typed = _flag(key, value)
        if line.kind is Kind.REFUSED:
            raise UserError(f"{typed} is a flag of other trainers, and cannot be used here: {line.comment}")
        if not line.ours:
            raise UserError(f"{typed} is a flag of other trainers: leave it out ({line.comment or 'nothing to set'})")
        raise UserError(f"{typed} is a flag of other trainers: here it is {_ours(line)}")


def _value(parts: Sequence[str]) -> Any:
    if not parts:
        return True
    read = [_parsed(part) for part in parts]
    return read[0] if len(read) == 1 else read


def _parsed(text: str) -> Any:
    try:
        return parse_yaml(text, "value") if text else text
    except UserError:  # for example a template
        return text


def _ours(line: Line) -> str:
    flags = []
    for name, value in line.ours.items():
        if name in _FILES:
            flags.append(f"--{_FILES[name]} {' '.join(file for entry in value for file in entry['files'])}")
        else:
            flags.append(_flag(name, value))
    return " ".join(flags)


def _flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--{name}=false"
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"--{name} {text}"


def _unknown(key: str, value: Any) -> str:
    close = did_you_mean(key, [*own_keys(), *flat.RULES])
    if close is None:
        return f"unrecognized arguments: {_flag(key, value)}: `sft train -h` lists all flags"
    if close in own_keys():
        return f"unrecognized arguments: {_flag(key, value)}: did you mean --{close}?"
    line = comment_on(flat.TRAINER, close, {close: value})
    ours = f": here it is {' '.join(f'--{_FILES.get(name, name)}' for name in line.ours)}" if line.ours else ""
    return f"unrecognized arguments: {_flag(key, value)}: did you mean {close} of other trainers{ours}?"
