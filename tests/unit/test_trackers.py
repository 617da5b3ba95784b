"""TensorBoard, W&B, Trackio and the chart of the loss."""

from __future__ import annotations

import builtins
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sft.observe.chart import series, smooth, write_loss_chart
from sft.observe.trackers import Guarded, Tracker, check_trackers, open_trackers, scalars
from tokenize_data.errors import UserError


class Fake:
    """Both wandb and trackio: init gives the run, and the module logs too."""

    def __init__(self, error: Exception | None = None) -> None:
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, float], int]] = []
        self.finished = 0
        self.error = error

    def init(self, **options: Any) -> Fake:
        if self.error:
            raise self.error
        self.inits.append(options)
        return self

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((metrics, step))

    def finish(self) -> None:
        self.finished += 1


def opened(folder: Path, warnings: list[str], start: int = 0, **wanted: bool) -> list[Tracker]:
    flags = {"tensorboard": False, "wandb": False, "trackio": False} | wanted
    config = {"lr": 1e-5, "data": ("a",), "path": Path("x"), "size": None}
    return open_trackers(folder, **flags, run_name="r", config=config, warn=warnings.append, start=start)


def test_scalars_are_the_finite_numbers_by_group():
    record = {
        "iteration": 3,
        "loss": 1.0,
        "val_loss": 2,
        "lr": None,
        "grad_norm": float("nan"),
        "note": "x",
        "flag": True,
    }
    assert scalars(record) == {"train/loss": 1.0, "val/loss": 2.0}


def test_none_wanted_is_none(tmp_path: Path):
    assert opened(tmp_path, []) == []
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_fails_is_switched_off_with_one_warning():
    class Failing:
        calls = 0

        def log(self, record: Mapping[str, Any]) -> None:
            self.calls += 1
            raise ConnectionError("no\nroute")

        def close(self) -> None:
            raise AssertionError("closed after it failed")

    warnings: list[str] = []
    failing = Failing()
    tracker = Guarded(failing, "wandb", warnings.append)
    for iteration in range(3):
        tracker.log({"iteration": iteration})
    tracker.close()
    assert warnings == ["wandb failed and is switched off, training continues: ConnectionError: no route"]
    assert failing.calls == 1


def test_wandb_keeps_its_run_over_a_resume_and_not_over_a_new_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for start in (0, 800, 0):
        (tracker,) = opened(tmp_path, [], start, wandb=True)
        tracker.log({"iteration": start + 1, "loss": 1.5})
        tracker.close()
        tracker.close()
    first, resumed, anew = fake.inits
    assert first["id"] == resumed["id"] != anew["id"]
    assert (first["project"], first["name"], first["resume"], first["dir"]) == ("mine", "r", "allow", str(tmp_path))
    assert first["config"] == {"lr": 1e-5, "data": ["a"], "path": "x", "size": None}
    assert fake.logged == [({"train/loss": 1.5}, 1), ({"train/loss": 1.5}, 801), ({"train/loss": 1.5}, 1)]
    assert fake.finished == 3


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "trackio", fake)  # type: ignore[arg-type]
    for start in (0, 800):
        (tracker,) = opened(tmp_path, [], start, trackio=True)
        tracker.log({"iteration": start + 1, "val_loss": 1.5})
        tracker.close()
    assert [options["resume"] for options in fake.inits] == ["never", "allow"]
    assert fake.logged[-1] == ({"val/loss": 1.5}, 801)
    assert fake.finished == 2


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    message = rf"^--{name} needs the {name} package: pip install 'megasft\[{name}\]', or leave --{name} out$"
    empty = tmp_path / "elsewhere" / name  # a folder of that name imports, but is not the package
    empty.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(empty.parent)])
    monkeypatch.delitem(sys.modules, name, raising=False)
    for module in (ModuleType(name), None):
        with pytest.raises(UserError, match=message):
            check_trackers(**{"wandb": False, "trackio": False, name: True})
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=message):
            opened(tmp_path, [], **{name: True})
        monkeypatch.delitem(sys.modules, name, raising=False)
    check_trackers(wandb=False, trackio=False)


def test_what_cannot_start_is_said_before_the_training_and_the_others_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "wandb", Fake(RuntimeError("api_key not configured")))  # type: ignore[arg-type]
    with pytest.raises(
        UserError,
        match=r"^--wandb: cannot start: RuntimeError: api_key not configured: run `wandb login`, set WANDB_MODE",
    ):
        opened(tmp_path, [], wandb=True)
    wandb = Fake()
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "trackio", Fake(RuntimeError("no room")))  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"^--trackio: cannot start: RuntimeError: no room: fix that, or leave --trackio out$"
    ):
        opened(tmp_path, [], wandb=True, trackio=True)
    assert wandb.finished == 1


def test_tensorboard_shows_a_resumed_run_once(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    warnings: list[str] = []
    for start, last in ((0, 5), (3, 6)):
        (tracker,) = opened(tmp_path, warnings, start, tensorboard=True)
        for iteration in range(start + 1, last + 1):
            tracker.log({"iteration": iteration, "loss": float(start), "note": "x"})
        tracker.close()
    files = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert files.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in files.Scalars("train/loss")] == [
        (1, 0),
        (2, 0),
        (3, 0),
        (4, 3),
        (5, 3),
        (6, 3),
    ]
    assert warnings == []


def test_without_tensorboard_one_line_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    warnings: list[str] = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # type: ignore[arg-type]
    assert opened(tmp_path, warnings, tensorboard=True) == []

    def broken(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=broken))  # type: ignore[arg-type]
    assert opened(tmp_path, warnings, tensorboard=True) == []
    assert warnings == [
        (
            "no TensorBoard files are written, the tensorboard package is missing: pip install 'megasft[tensorboard]', "
            "or --no_tensorboard"
        ),
        "no TensorBoard files are written: PermissionError: [Errno 13] Permission denied",
    ]


# the chart

PNG = b"\x89PNG"


@pytest.mark.parametrize(
    "records",
    [
        [{"iteration": 1, "loss": 2.0, "lr": 1e-5}],
        [{"iteration": 0, "val_loss": 2.0}],
        [
            {"iteration": k, "loss": 9 / k, "lr": 1e-5, "grad_norm": 1.0, **({"val_loss": 1.0} if k % 100 == 0 else {})}
            for k in range(1, 301)
        ],
        [
            {"iteration": k, "loss": None if k == 2 else float("nan") if k == 3 else 1.0, "grad_norm": 1.0}
            for k in range(1, 6)
        ],
        [{"iteration": 1, "loss": 2.0, "val_loss": None, "lr": float("inf")}, {"note": "no iteration", "loss": 1.0}],
    ],
    ids=["one", "validation only", "many", "not finite", "no validation"],
)
def test_a_chart_of_whatever_there_is(tmp_path: Path, records: list[dict[str, Any]]):
    pytest.importorskip("matplotlib")
    assert write_loss_chart(records, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("records", [[], [{"iteration": 1, "loss": None}], [{"iteration": 1, "lr": 1.0}]])
def test_no_chart_of_nothing(tmp_path: Path, records: list[dict[str, Any]]):
    assert not write_loss_chart(records, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_no_chart_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert not write_loss_chart([{"iteration": 1, "loss": 1.0}], tmp_path / "loss.png")


def test_a_chart_that_cannot_be_written(tmp_path: Path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match=r"^cannot write .*loss\.png: No such file or directory: check the folder"):
        write_loss_chart([{"iteration": 1, "loss": 1.0}], tmp_path / "nowhere" / "loss.png")


def test_smoothing_leaves_a_constant_as_it_is_and_bears_gaps():
    values = np.full(500, 2.0)
    values[[0, 100, 499]] = np.nan
    smoothed = smooth(values)
    assert np.isnan(smoothed[[0, 100, 499]]).all()
    assert np.allclose(smoothed[np.isfinite(smoothed)], 2.0)
    noisy = 1.0 + np.random.default_rng(0).normal(size=500)
    assert smooth(noisy).std() < 0.5 * noisy.std()
    assert series([{"iteration": 4, "loss": None}, {"iteration": 5}], "loss")[0].tolist() == [4]
