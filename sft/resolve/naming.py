"""The run's folder: its name says which settings differ from the defaults, so that a run is found again, and not mixed
up.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

from sft.config.train import TrainConfig
from tokenize_data.errors import UserError

Named = TrainConfig | SimpleNamespace  # settings, or what a file says that they were
_LAYOUT = re.compile(r"-tp(\d+)-pp(\d+)(?=[-/.]|$)")


def run_folder(config: TrainConfig, base_family: str, is_entry: bool) -> Path:
    """<save_checkpoint_dir>/<base>-<size>-<checkpoint>-<run_name><suffixes>; `base_family` is the model's own type.

    `is_entry` says that the checkpoint is a name of checkpoints.toml, not a path: then it has a size, 7 unless another
    is given.
    """
    size = (config.size or "7") if is_entry else config.size
    return Path(config.save_checkpoint_dir) / "-".join([base_family, *([size] if size else []), name_of(config)])


def name_of(config: Named) -> str:
    """<checkpoint>-<run_name><suffixes>. Different settings may give one name: `a-ep5`, and `a` with five epochs."""
    return f"{Path(config.checkpoint).name}-{config.run_name}{_suffixes(config)}"


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


def _suffixes(config: Named) -> str:
    suffixes = [f"it{config.intermediate_iter:07d}"] if config.intermediate_iter is not None else []
    defaults = TrainConfig(run_name="x")
    for name, label in (("epochs", "ep"), ("seq", "seq"), ("loss_mask", "loss"), ("lora", "lora")):
        if (value := getattr(config, name)) != getattr(defaults, name):
            suffixes.append(f"{label}{value:g}" if isinstance(value, float) else f"{label}{value}")
    suffixes += [config.id] if config.id else []
    return "".join(f"-{suffix}" for suffix in suffixes)
