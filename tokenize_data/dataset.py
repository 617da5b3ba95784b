"""A data set of a run: its files, how to read its rows, how much of it to take, and the names of the row formats."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from tokenize_data.columns import Columns
from tokenize_data.errors import UserError

# In the order of detection. A new format is a name here and a file of that name in `formats`.
FORMATS = ("qa", "prompt_completion", "chat", "sharegpt", "alpaca", "input_output", "text")

RIGHT, QUESTION, REFUSE = TRUNCATIONS = ("right", "question", "refuse")
SIDES = ("end", "start")

DEFAULT_QUESTION_KEY, DEFAULT_ANSWER_KEY, DEFAULT_TEXT_KEY = "prompt", "gold", "text"


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """Cleaning of a data set's texts before a prompt template is filled."""

    drop: str | None = None
    lower: bool = False
    strip: bool = False

    def __post_init__(self) -> None:
        if self.drop is not None:
            try:
                re.compile(self.drop)
            except re.error as error:
                raise UserError(
                    f"clean: drop: {self.drop!r} is not a regular expression ({error}): write a class such as "
                    "[^a-zA-Z0-9\\s]"
                ) from error

    def __call__(self, text: str) -> str:
        text = re.sub(self.drop, "", text) if self.drop else text
        text = text.lower() if self.lower else text
        return text.strip() if self.strip else text


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One data set of a run: its files, how to read its rows, and how much of it to take."""

    files: tuple[str, ...]
    name: str = ""
    format: str | None = None
    question_key: str = DEFAULT_QUESTION_KEY
    answer_key: str = DEFAULT_ANSWER_KEY
    system_key: str | None = None
    text_key: str = DEFAULT_TEXT_KEY
    prompt: str | None = None
    answer: str | None = None
    system: str | None = None
    weight: float = 1.0
    samples: int | None = None
    weight_key: str | None = None
    train_on: str = "all"
    truncate: str | None = None  # None: the run's setting, "right" by default
    truncate_side: str | None = None
    clean: Cleaning = Cleaning()
    columns: Columns | None = None

    def __post_init__(self) -> None:
        if not self.files:
            raise UserError(f"data set '{self.name}' has no files: give at least one")
        if self.format is not None and self.format not in FORMATS:
            raise UserError(f"unknown format '{self.format}': use one of {', '.join(FORMATS)}")
        if self.format is not None and self.columns is not None:
            raise UserError(f"data set '{self.name}' has format {self.format} and columns: give one of them")
        for name, known in (("truncate", TRUNCATIONS), ("truncate_side", SIDES)):
            if getattr(self, name) not in (None, *known):
                raise UserError(f"data set '{self.name}': {name} {getattr(self, name)}: use one of {', '.join(known)}")
        if not 0 < self.weight < float("inf"):
            raise UserError(f"data set '{self.name}': weight {self.weight} must be above 0")
        if not self.train_on.strip(" ,"):
            raise UserError(f"data set '{self.name}': train_on is empty: use all, last, or names")
        if self.samples is not None and self.samples < 1:
            raise UserError(f"data set '{self.name}': samples {self.samples} must be at least 1")
        if self.samples is not None and self.weight != 1.0:
            raise UserError(
                f"data set '{self.name}' has samples {self.samples} and weight {self.weight}: give one of them"
            )

    def truncated(self, truncate: str, side: str) -> DatasetSpec:
        """A copy with the run's truncation, if this data set has none."""
        chosen = self.truncate or truncate
        return replace(self, truncate=chosen, truncate_side=self.truncate_side or side if chosen == QUESTION else None)

    def reading(self) -> dict[str, Any]:
        """The fields that determine a row's text, as kept in a manifest."""
        return {key: value for key, value in asdict(self).items() if key not in ("files", "name")}


def reading_of(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """The reading in a manifest as arguments of a DatasetSpec. Older shards have fewer keys."""
    known = {field.name for field in fields(DatasetSpec)} - {"files", "name", "weight", "samples"}
    reading = {
        key: value for key, value in (dataset.get("reading") or {}).items() if key in known and value is not None
    }
    if isinstance(reading.get("clean"), dict):
        reading["clean"] = Cleaning(**reading["clean"])
    if isinstance(reading.get("columns"), dict):
        reading["columns"] = Columns(**reading["columns"])
    return reading
