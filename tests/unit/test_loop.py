"""What happens around iterations, with stubs for all that computes: what takes long is no hang, and whatever ends a
run, it saves first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from sft.checkpoint.commit import ALONE, Peers
from sft.config.settings import Settings
from sft.objective.cross_entropy import CrossEntropy
from sft.spec.errors import CheckpointError, TrainingError
from sft.spec.run import OpenData
from sft.worker import loop
from sft.worker import train as worker
from sft.worker.ending import Interrupt, PreemptedError
from sft.worker.watch import Watch
from sft.worker.watchdog import Watchdog
from tests.distributed.data import MemoryReader
from tokenize_data.errors import UserError

TWO = Peers(rank=0, size=2, gather=lambda mine: [mine, mine])
GIB, HOUR = 1 << 30, 3600.0


class Scene:
    """A run of some iterations, each of which takes a second, with everything that follows them taking hours."""

    def __init__(self, folder: Path, iterations: int = 6, **settings: Any) -> None:
        self.now, self.moved = 0.0, 0
        self.events: list[str] = []
        self.said: list[str] = []
        self.break_at: dict[int, Exception] = {}
        self.signal_at: int | None = None
        self.tell: Callable[[dict[str, Any]], None] = lambda record: None
        self.can_save = True
        self.finals: list[int] = []  # saves after which nothing is trained
        self.watchdog = Watchdog(None, self.said.append, clock=lambda: self.now, moved=lambda _: self.moved)
        self.interrupt = Interrupt()
        given = Settings.of(run_name="r", global_batch=4, tensorboard=False, **settings)
        reader: Any = MemoryReader(40, 131, 64)
        self.data = OpenData(training=reader, validation=reader)
        layout = SimpleNamespace(dp=1, tp=1, sequence_parallel=False)
        self.spec: Any = SimpleNamespace(
            settings=given,
            layout=layout,
            capacity=64,
            validation=SimpleNamespace(documents=len(reader)),
            iterations=iterations,
            folder=folder,
            sampler=SimpleNamespace(documents=lambda number: np.arange(4)),
        )
        self.pipeline: Any = SimpleNamespace(
            processes=SimpleNamespace(replica=0, layout=layout), should_stop=False, objective=CrossEntropy()
        )

    # -- the stubs

    def hours(self, what: str, hours: int = 3, *, is_progress: bool = True) -> None:
        """Something that takes long. Each time that the watchdog looks, some bytes have moved."""
        self.events.append(what)
        for _ in range(hours * 4):
            self.now += HOUR / 4
            self.moved += GIB if is_progress else 0
            assert self.watchdog.hang() is None, what

    def train(self, *_: Any, start: int, iterations: int, **__: Any) -> Iterator[dict[str, Any]]:
        for number in range(start + 1, iterations + 1):
            self.now += 1
            assert self.watchdog.hang() is None
            if number in self.break_at:
                raise self.break_at[number]
            self.pipeline.should_stop = self.interrupt.is_asked
            yield {"iteration": number, "loss": 1.0}
            if number == self.signal_at:
                self.interrupt.name = "SIGTERM"

    def validate(self, pipeline: Any, feed: Any, parts: dict[str, range]) -> dict[str, float]:
        self.events.append("validate")
        for first in range(0, sum(map(len, parts.values())), 10):
            batch, micro_batches = feed.plan_for_validation(np.arange(first, first + 10), 1)
            for _ in micro_batches:
                self.now += 110
                assert self.watchdog.hang() is None
            assert batch.plan.num_micro_batches
        return {"val_loss": float(len(self.events)), "val_perplexity": 1.0, "val_accuracy": 1.0}

    def save(self, number: int, result: dict[str, Any], *, is_final: bool) -> None:
        self.hours(f"save {number}")
        self.finals += [number] if is_final else []

    def finish(self) -> bool:
        self.hours("finish")
        return self.can_save

    def run(self, peers: Peers = ALONE, start: int = 0) -> dict[str, Any]:
        saver: Any = SimpleNamespace(save=self.save, finish=self.finish, poll=lambda: None, best=None)
        watch = Watch()
        watch.record, watch.warn, watch.say = self.tell, self.said.append, self.said.append  # type: ignore[method-assign]
        return loop.iterate(
            self.spec, self.data, self.pipeline, watch, saver, peers, start, self.watchdog, self.interrupt
        )


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scene]:
    def make(**settings: Any) -> Scene:
        made = Scene(tmp_path, **settings)
        monkeypatch.setattr(loop, "train", made.train)
        monkeypatch.setattr(loop, "validate", made.validate)
        monkeypatch.setattr(loop.resume, "restore", lambda *_: made.hours("restore"))
        monkeypatch.setattr(loop, "Checkpoint", lambda folder: folder.name)
        return made

    return make


def test_nothing_that_takes_hours_is_a_hang(scene: Callable[..., Scene]):
    made = scene(save_interval=2, eval_interval=3, early_stopping=9)
    result = made.run()
    assert made.events == ["save 2", "validate", "save 3", "save 4", "validate", "save 6", "finish", "restore"]
    assert result["iterations"] == 3
    assert made.finals == [6]
    assert "the model of iteration 3 is exported, with the best validation loss, 2.0000" in made.said


def test_writing_the_model_is_no_hang(scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    made = scene()
    made.run()
    stubbed = (
        "start_worker",
        "stop_worker",
        "form_groups",
        "read_base",
        "self_check",
        "Pipeline",
        "peers_of",
        "go_on",
        "facts_for",
        "Saver",
        "keep_tokenizer",
        "training_facts",
        "_origins",
        "stage_adapters",
        "dist",
        "DTYPES",
        "Interrupt",
    )
    for name in stubbed:
        monkeypatch.setattr(worker, name, MagicMock())
    monkeypatch.setattr(worker, "load_stage", lambda *_: (MagicMock(all_places={}), {}))
    monkeypatch.setattr(worker, "Watchdog", lambda *_: made.watchdog)
    monkeypatch.setattr(made.watchdog, "start", lambda: None)
    monkeypatch.setattr(worker, "iterate", lambda *_: {})
    monkeypatch.setattr(worker, "_write_result", lambda *_: made.hours("export"))
    worker.work(MagicMock(folder=tmp_path, settings=Settings.of(run_name="r")), MagicMock(), MagicMock())
    assert made.events[-1] == "export"


def test_writing_that_moves_nothing_is_one(scene: Callable[..., Scene]):
    made = scene(save_interval=2)
    made.finish = lambda: made.hours("finish", is_progress=False)  # type: ignore[assignment,method-assign,func-returns-value]
    with pytest.raises(AssertionError, match="finish"):
        made.run()


@pytest.mark.parametrize(
    "error", [UserError("a shard is damaged"), OSError(5, "Input/output error"), TrainingError("not finite")]
)
def test_what_ends_the_run_comes_after_a_save(scene: Callable[..., Scene], error: Exception):
    made = scene()
    made.break_at = {4: error}
    with pytest.raises(type(error)) as raised:
        made.run()
    assert raised.value is error
    assert made.events == ["save 3", "finish"]
    assert made.finals == [3]
    assert made.said == ["iteration 3 was saved before the run ends: run the same command to resume"]


def test_a_validation_that_fails_loses_nothing(scene: Callable[..., Scene]):
    made = scene(eval_interval=5)

    def fail(*_: Any) -> None:
        raise UserError("part-1.arrow is missing")

    loop.validate = fail  # type: ignore[assignment]  # the fixture puts it back
    with pytest.raises(UserError, match=r"part-1\.arrow is missing"):
        made.run()
    assert made.events == ["save 5", "finish"]


def test_nothing_is_saved_where_nothing_was_trained(scene: Callable[..., Scene]):
    made = scene()
    made.break_at = {3: UserError("no")}
    with pytest.raises(UserError):
        made.run(start=2)
    assert made.events == []


def test_an_error_in_the_middle_of_an_update_saves_nothing(scene: Callable[..., Scene]):
    made = scene()
    made.break_at = {3: RuntimeError("CUDA error")}
    with pytest.raises(RuntimeError):
        made.run()
    assert made.events == []


@pytest.mark.parametrize(
    ("error", "events"), [(UserError("one rank's"), []), (TrainingError("everyone's"), ["save 2", "finish"])]
)
def test_of_several_processes_all_save_or_none(scene: Callable[..., Scene], error: Exception, events: list[str]):
    made = scene()
    made.break_at = {3: error}
    with pytest.raises(type(error)):
        made.run(TWO)
    assert made.events == events


@pytest.mark.parametrize("peers", [ALONE, TWO])
def test_metrics_that_cannot_be_written_end_the_run_on_all_processes(scene: Callable[..., Scene], peers: Peers):
    made = scene()

    def tell(record: dict[str, Any]) -> None:
        if record["iteration"] >= 2:
            raise UserError("cannot write metrics.jsonl: No space left on device")

    made.tell = tell
    with pytest.raises(UserError, match="No space left"):
        made.run(peers)
    assert made.events == ["save 3", "finish"]


def test_the_last_line_of_the_metrics_is_not_worth_the_model(scene: Callable[..., Scene]):
    made = scene(iterations=2)

    def tell(record: dict[str, Any]) -> None:
        if record["iteration"] == 2:
            raise UserError("cannot write metrics.jsonl: No space left on device")

    made.tell = tell
    assert made.run()["iterations"] == 2
    assert made.said == ["cannot write metrics.jsonl: No space left on device"]


@pytest.mark.parametrize("can_save", [True, False])
def test_a_signal_saves_and_leaves(scene: Callable[..., Scene], can_save: bool):
    made = scene()
    made.signal_at, made.can_save = 2, can_save
    with pytest.raises(PreemptedError if can_save else CheckpointError, match="after iteration 3"):
        made.run()
    assert made.events == ["save 3", "finish"]
