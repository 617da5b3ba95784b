"""The base model of a run: where it is, and what its files say."""

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
    is_entry: bool  # of checkpoints.toml; otherwise a path was given
    fingerprint: str  # of configuration, names and shapes, and of samples of the weights

    @property
    def family(self) -> str:
        return str(self.config["model_type"])
