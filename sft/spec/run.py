"""A resolved run: everything that its processes need, as one value and as run.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from sft.config.settings import Settings
from sft.plan.layout import Layout
from sft.plan.mixing import MixPart
from sft.plan.sampler import Sampler
from sft.spec.base import BaseModel
from tokenize_data.bases import Base
from tokenize_data.errors import UserError, shorten
from tokenize_data.manifest import PERMUTATION
from tokenize_data.reader import ShardReader

FILE = "run.json"
_VERSION = 1
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A tokenised data set: its folder on this node, and its content."""

    folder: Path
    fingerprint: str
    documents: int
    tokens: int
    trained_tokens: int
    shuffle: str = PERMUTATION

    @classmethod
    def of(cls, reader: ShardReader) -> DataSet:
        manifest = reader.manifest
        return cls(
            folder=reader.folder,
            fingerprint=manifest.fingerprint(),
            documents=len(reader),
            tokens=manifest.tokens,
            trained_tokens=manifest.trained_tokens,
            shuffle=manifest.shuffle,
        )

    def open(self) -> ShardReader:
        """Open all shards and keep them open, so that retokenising does not disturb this process."""
        reader = ShardReader(self.folder).keep_open()
        if reader.manifest.fingerprint() != self.fingerprint:
            raise UserError(f"{self.folder} was tokenised again while this run was starting: start the run again")
        return reader


@dataclass(frozen=True, kw_only=True)
class OpenData:
    training: ShardReader
    validation: ShardReader | None


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """`asked` are the settings as the user gave them, `settings` the same with every choice made."""

    asked: Settings
    settings: Settings
    base: BaseModel
    adapter_fingerprint: str | None  # fingerprint of the adapter that training starts from
    data: DataSet
    validation: DataSet | None
    vocabulary_size: int  # of the trained model: the larger of the base's and the tokenizer's
    layout: Layout
    stages: tuple[range, ...]  # the layers of each pipeline stage
    tokens_at_once: int  # how many tokens' logits are in memory at once
    folder: Path
    versions: dict[str, str]
    seconds_per_iteration: float | None = None  # as planned; None on hardware that the planner does not know
    mix: tuple[MixPart, ...] = ()  # empty for a single data set
    layout_note: str = ""  # why the layout differs from the entry's

    @property
    def iterations(self) -> int:
        return _known(self.settings.schedule.iters)

    @property
    def micro_batch(self) -> int:
        return _known(self.settings.layout.micro_batch)

    @property
    def recompute(self) -> str:
        return _known(self.settings.layout.recompute)

    @property
    def dtype(self) -> str:
        return _known(self.settings.model.dtype)

    @property
    def capacity(self) -> int:
        """Maximum number of tokens in a packed row."""
        return self.micro_batch * self.settings.data.seq

    @property
    def sampler(self) -> Sampler:
        schedule = self.settings.schedule
        return Sampler(
            self.data.documents,
            schedule.global_batch,
            self.settings.data.seed,
            self.mix,
            is_in_order=schedule.order == "curriculum",
            shuffle=self.data.shuffle,
        )

    @property
    def result_folder(self) -> Path:
        """Written last: its presence marks the run as finished."""
        return self.folder / ("hf" if self.settings.adapters.lora is None else "adapter")

    def open_data(self) -> OpenData:
        return OpenData(training=self.data.open(), validation=self.validation.open() if self.validation else None)

    def facts(self) -> dict[str, Any]:
        """Facts that run.toml, checkpoints and training.json record besides the settings."""
        return {
            "base": self.base.entry.path,
            "base_folder": str(self.base.folder.resolve()),
            "base_fingerprint": self.base.fingerprint,
            "adapter_fingerprint": self.adapter_fingerprint,
            "model_type": self.base.family,
            "iterations": self.iterations,
            "documents": self.data.documents,
            "data": self.data.fingerprint,
            "data_folder": str(self.data.folder.resolve()),
            "tp": self.layout.tp,
            "pp": self.layout.pp,
            "dp": self.layout.dp,
            "sequence_parallel": self.layout.sequence_parallel,
            "micro_batch": self.micro_batch,
            "recompute": self.recompute,
            "dtype": self.dtype,
        }

    def as_json(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "asked": self.asked.as_json(),
            "settings": self.settings.as_json(),
            "base": _plain(asdict(self.base)),
            "adapter_fingerprint": self.adapter_fingerprint,
            "data": _plain(asdict(self.data)),
            "validation": None if self.validation is None else _plain(asdict(self.validation)),
            "vocabulary_size": self.vocabulary_size,
            "layout": asdict(self.layout),
            "stages": [[stage.start, stage.stop] for stage in self.stages],
            "tokens_at_once": self.tokens_at_once,
            "folder": str(self.folder),
            "versions": self.versions,
            "seconds_per_iteration": self.seconds_per_iteration,
            "mix": [asdict(part) for part in self.mix],
            "layout_note": self.layout_note,
        }

    def text(self) -> str:
        return json.dumps(self.as_json(), indent=2, ensure_ascii=True) + "\n"

    @classmethod
    def from_json(cls, content: Any, where: str) -> RunSpec:
        """Parse run.json. `where` names the file or the sender in messages."""
        if not isinstance(content, dict) or content.get("version") != _VERSION:
            raise UserError(f"{where} was not written by this version of sft: install one version everywhere")
        try:
            return cls._from_json(content)
        except (KeyError, TypeError, AttributeError, ValueError, AssertionError) as error:
            raise UserError(f"{where} is damaged ({shorten(error, 80)}): start the run again") from error

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> RunSpec:
        base, validation = content["base"], content["validation"]
        entry = Base(**{**base["entry"], "add_tokens": tuple(base["entry"]["add_tokens"])})
        return cls(
            asked=Settings.from_json(content["asked"]),
            settings=Settings.from_json(content["settings"]),
            base=BaseModel(**{**base, "entry": entry, "folder": Path(base["folder"])}),
            adapter_fingerprint=content["adapter_fingerprint"],
            data=_data_set(content["data"]),
            validation=None if validation is None else _data_set(validation),
            vocabulary_size=content["vocabulary_size"],
            layout=Layout(**content["layout"]),
            stages=tuple(range(first, last) for first, last in content["stages"]),
            tokens_at_once=content["tokens_at_once"],
            folder=Path(content["folder"]),
            versions=content["versions"],
            seconds_per_iteration=content["seconds_per_iteration"],
            mix=tuple(MixPart(**part) for part in content.get("mix", ())),  # older runs have none
            layout_note=content["layout_note"],
        )

    @classmethod
    def read(cls, file: Path) -> RunSpec:
        try:
            content = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file} cannot be read ({shorten(error, 80)}): start the run again") from error
        return cls.from_json(content, str(file))


def _known(value: T | None) -> T:
    assert value is not None, "resolve leaves no choice open"
    return value


def _data_set(content: dict[str, Any]) -> DataSet:
    return DataSet(**{**content, "folder": Path(content["folder"])})


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Convert paths to text."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
