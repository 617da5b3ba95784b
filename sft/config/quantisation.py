"""The formats for frozen weights. A new one is a line here and a file of its name in `sft/model/formats`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """What planner, model and checkpoints need to know about a format."""

    name: str
    bits: int
    bytes_each: float  # per weight, including the scales of its block or row


QUANTISATIONS: dict[str, Quantisation] = {
    "nf4": Quantisation(name="nf4", bits=4, bytes_each=0.5 + 4 / 64),
    "int8": Quantisation(name="int8", bits=8, bytes_each=1.0 + 4 / 4096),
}
# Settings that each select a format; the last one is from older runs.
FLAGS = {"load_in_4bit": "nf4", "weight_only_8bit": "int8", "load_in_8bit": "int8"}


def quantisation_of(values: Mapping[str, Any]) -> Quantisation | None:
    """The format that these settings select, also for older runs."""
    name = values.get("quantise") or next((name for flag, name in FLAGS.items() if values.get(flag)), None)
    return QUANTISATIONS[name] if name else None
