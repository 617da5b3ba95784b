"""Names the run's folder after the settings that differ from their defaults."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft.config.settings import SUFFIXES, Settings, defaults
from tokenize_data.errors import UserError

DEFAULT_SIZE = "7"
_LAYOUT = re.compile(r"-tp(\d+)-pp(\d+)(?=[-/.]|$)")


def run_folder(settings: Settings, base_family: str, is_entry: bool) -> Path:
    """<save_checkpoint_dir>/<base>-<size>-<checkpoint>-<run_name><suffixes>; `base_family` is the model's own type.

    `is_entry` says that the checkpoint is a name of checkpoints.toml, not a path: then it has a size, 7 unless another
    is given.
    """
    size = (settings.model.size or DEFAULT_SIZE) if is_entry else settings.model.size
    return Path(settings.output.save_checkpoint_dir) / "-".join(
        [base_family, *([size] if size else []), name_of(settings.as_json())]
    )


def name_of(values: Mapping[str, Any]) -> str:
    """<checkpoint>-<run_name><suffixes>. Different settings may give one name: `a-ep5`, and `a` with five epochs."""
    return f"{Path(values['checkpoint']).name}-{values['run_name']}{_suffixes(values)}"


def layout_of_path(path: str) -> tuple[int, int] | None:
    """(tp, pp) from `-tpN-ppM` in a base model's path, as converted Megatron checkpoints are named."""
    found = _LAYOUT.search(path)
    return (int(found.group(1)), int(found.group(2))) if found else None


def intermediate_name(pattern: str | None, iteration: int, where: str) -> str:
    """The revision or subfolder of an early release of the base model."""
    if pattern is None:
        raise UserError(
            f"{where} has no 'intermediate' pattern, so --intermediate_iter {iteration} names nothing: add one, "
            "or leave it out"
        )
    try:
        return pattern.format(iter=iteration)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"{where}: intermediate = {pattern!r} cannot be filled with iter={iteration}: write it as iter_{{iter:07d}}"
        ) from error


def _suffixes(values: Mapping[str, Any]) -> str:
    early, default = values["intermediate_iter"], defaults()
    suffixes = [f"it{early:07d}"] if early is not None else []
    for name, label in SUFFIXES:
        if (value := values[name]) != default[name]:
            suffixes.append(f"{label}{value:g}" if isinstance(value, float) else f"{label}{value}")
    suffixes += [values["id"]] if values["id"] else []
    return "".join(f"-{suffix}" for suffix in suffixes)
