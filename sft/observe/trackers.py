"""TensorBoard, Weights & Biases and Trackio, fed from metrics.jsonl. A tracker's failure never stops training."""

from __future__ import annotations

import importlib
import importlib.util
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from sft.spec.metrics import number
from sft.spec.run_folder import replace_file
from tokenize_data.errors import UserError

_PROJECT = "sft"


class Tracker(Protocol):
    def log(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def check_trackers(*, wandb: bool, trackio: bool) -> None:
    """Check before any process starts that the requested trackers are installed, without importing them."""
    for name, wanted in (("wandb", wandb), ("trackio", trackio)):
        spec = importlib.util.find_spec(name) if wanted else None
        if wanted and (spec is None or spec.origin is None):  # without an origin it is just a folder of that name
            raise _missing(name)


def open_trackers(
    folder: Path,
    *,
    tensorboard: bool,
    wandb: bool,
    trackio: bool,
    run_name: str,
    config: Mapping[str, Any],
    warn: Callable[[str], None],
    start: int = 0,
) -> list[Tracker]:
    """Open the requested trackers. `start` is the iteration after which the run resumes, 0 for a new one."""
    trackers: list[Tracker] = []
    settings = {key: _plain(value) for key, value in config.items()}
    try:
        if wandb:
            trackers.append(Guarded(_Wandb(folder, run_name, settings, start), "wandb", warn))
        if trackio:
            trackers.append(Guarded(_Trackio(run_name, settings, start), "trackio", warn))
    except UserError:
        for tracker in trackers:
            tracker.close()
        raise
    if tensorboard and (board := _tensorboard(folder / "tensorboard", start, warn)):
        trackers.append(Guarded(board, "tensorboard", warn))
    return trackers


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The record's numbers under names that trackers group: train/loss, val/loss."""
    values = {key: number(record, key) for key in record if key != "iteration"}
    return {_tag(key): value for key, value in values.items() if value is not None}


class Guarded:
    """Wraps a tracker: on its first failure it is switched off with a warning."""

    def __init__(self, tracker: Tracker, name: str, warn: Callable[[str], None]) -> None:
        self._tracker: Tracker | None = tracker
        self._name, self._warn = name, warn

    def log(self, record: Mapping[str, Any]) -> None:
        if self._tracker:
            self._attempt(lambda tracker: tracker.log(record))

    def close(self) -> None:
        if self._tracker:
            self._attempt(lambda tracker: tracker.close())
        self._tracker = None

    def _attempt(self, action: Callable[[Tracker], None]) -> None:
        assert self._tracker
        try:
            action(self._tracker)
        except Exception as error:  # whatever the error is, training continues
            self._tracker = None
            self._warn(f"{self._name} failed and is switched off, training continues: {_one_line(error)}")


class _TensorBoard:
    def __init__(self, folder: Path, start: int) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(folder), purge_step=start + 1)  # hides what an earlier attempt wrote after `start`

    def log(self, record: Mapping[str, Any]) -> None:
        for tag, value in scalars(record).items():
            self._writer.add_scalar(tag, value, int(record["iteration"]))

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, run_name: str, config: dict[str, Any], start: int) -> None:
        module = _module("wandb")
        options = {
            "project": os.environ.get("WANDB_PROJECT", _PROJECT),
            "name": run_name,
            "dir": str(folder),
            "config": config,
        }
        resuming = {"id": _run_id(folder / "wandb" / "run_id", start), "resume": "allow", "allow_val_change": True}
        try:
            self._run = module.init(
                **options, **resuming, settings={"console": "off"}
            )  # otherwise it records the progress bar
        except Exception as error:
            remedy = "run `wandb login`, set WANDB_MODE=offline, or leave --wandb out"
            raise UserError(f"--wandb: cannot start: {_one_line(error)}: {remedy}") from error

    def log(self, record: Mapping[str, Any]) -> None:
        self._run.log(scalars(record), step=int(record["iteration"]))

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, run_name: str, config: dict[str, Any], start: int) -> None:
        self._module = _module("trackio")
        try:
            self._module.init(project=_PROJECT, name=run_name, config=config, resume="allow" if start else "never")
        except Exception as error:
            raise UserError(f"--trackio: cannot start: {_one_line(error)}: fix that, or leave --trackio out") from error

    def log(self, record: Mapping[str, Any]) -> None:
        self._module.log(scalars(record), step=int(record["iteration"]))

    def close(self) -> None:
        self._module.finish()


def _tensorboard(folder: Path, start: int, warn: Callable[[str], None]) -> Tracker | None:
    """Open TensorBoard. It is on by default, so a missing package is not an error."""
    try:
        return _TensorBoard(folder, start)
    except ImportError:
        warn(
            "no TensorBoard files are written, the tensorboard package is missing: pip install "
            "'megasft[tensorboard]', or --no_tensorboard"
        )
    except Exception as error:
        warn(f"no TensorBoard files are written: {_one_line(error)}")
    return None


def _module(name: str) -> Any:
    """Import a tracker. A folder of that name in the working directory would import as well, but is empty."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise _missing(name) from error
    if not hasattr(module, "init"):
        raise _missing(name)
    return module


def _missing(name: str) -> UserError:
    return UserError(f"--{name} needs the {name} package: pip install 'megasft[{name}]', or leave --{name} out")


def _run_id(file: Path, start: int) -> str:
    """The id of the resumed run, or a new one."""
    if start and file.exists() and (known := file.read_text().strip()):
        return known
    made = uuid.uuid4().hex
    replace_file(file, made + "\n")
    return made


def _tag(key: str) -> str:
    return f"val/{key.removeprefix('val_')}" if key.startswith("val_") else f"train/{key}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
