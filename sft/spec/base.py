"""The base model of a run: its location and the facts in its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenize_data.bases import Base


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    entry: Base
    folder: Path
    config: dict[str, Any]  # config.json
    num_parameters: int
    is_entry: bool  # whether it is an entry of checkpoints.toml; otherwise a path
    fingerprint: str  # hash of configuration, names, shapes, and samples of the weights

    @property
    def family(self) -> str:
        return str(self.config["model_type"])
