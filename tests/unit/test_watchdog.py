"""When a process counts as hanging: by a clock that the test moves."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft.worker import ending, watchdog
from sft.worker.watchdog import Watchdog, bytes_moved

HOUR = 3600.0
GIB = 1 << 30


class Time:
    """A clock, and bytes that somebody moves."""

    def __init__(self) -> None:
        self.now, self.moved = 0.0, 0

    def watchdog(self, given: float | None = None, iteration_seconds: float = 1.0, iterations: int = 4) -> Watchdog:
        """After some iterations."""
        made = Watchdog(given, lambda text: None, clock=lambda: self.now, moved=lambda folder: self.moved)
        for _ in range(iterations):
            self.now += iteration_seconds
            made.beat(is_iteration=True)
        return made


@pytest.mark.parametrize(
    ("given", "iteration_seconds", "limit"),
    [(None, 1.0, 120.0), (None, 100.0, 1000.0), (30.0, 1.0, 30.0), (30.0, 100.0, 30.0)],
)
def test_iterations_have_ten_times_what_is_usual(given: float | None, iteration_seconds: float, limit: float):
    time = Time()
    dog = time.watchdog(given, iteration_seconds)
    time.now += limit
    assert dog.hang() is None
    time.now += 1
    reason = dog.hang()
    assert reason is not None
    assert reason.startswith(f"no progress for {limit + 1:.0f} s on rank 0 of ")
    assert reason.endswith(": this process hangs, or one that it waits for")


def test_files_may_take_as_long_as_bytes_move():
    time = Time()
    dog = time.watchdog()
    with dog.during("saving", folder=Path("run")):
        for _ in range(20):
            time.now += 0.9 * HOUR
            time.moved += GIB
            assert dog.hang() is None
        time.now += HOUR + 1
        time.moved += 100  # a line of a log is no progress
        reason = dog.hang()
    assert reason is not None
    assert "while saving: this process" in reason
    time.now += 100
    assert dog.hang() is None
    time.now += 100
    assert dog.hang() is not None  # back to iterations


def test_a_limit_that_was_given_is_one_for_files_too():
    time = Time()
    dog = time.watchdog(given=4.0)
    with dog.during("saving"):
        time.now += 3
        time.moved += GIB
        assert dog.hang() is None
        time.now += 3
        assert dog.hang() is None
        time.now += 2
        assert dog.hang() is not None


def test_a_validation_may_take_as_long_as_its_documents():
    time = Time()
    dog = time.watchdog(iteration_seconds=60.0)
    with dog.during("validating", iterations=16.0):
        time.now += 16 * 600
        assert dog.hang() is None
        dog.beat()
        time.now += 16 * 600
        assert dog.hang() is None
        time.now += 1
        assert dog.hang() is not None


def test_a_validation_after_the_first_iteration_has_nothing_usual_yet():
    time = Time()
    dog = time.watchdog(iterations=1)
    with dog.during("validating", iterations=1.0):
        time.now += HOUR - 1
        assert dog.hang() is None


def test_what_is_usual_is_of_iterations_alone():
    time = Time()
    dog = time.watchdog(iteration_seconds=1.0)
    for _ in range(30):
        with dog.during("saving"):
            time.now += 500
        time.now += 1
        dog.beat(is_iteration=True)
    assert dog.limit == 120.0


def test_bytes_are_counted(tmp_path: Path):
    before = bytes_moved(tmp_path)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_bytes(bytes(3 << 20))
    assert bytes_moved(tmp_path) - before >= 3 << 20
    assert bytes_moved(tmp_path / "missing") > 0
    assert bytes_moved(None) > 0


def test_a_hang_ends_the_process_with_its_reason(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    left: list[tuple[int, str]] = []
    dog = Watchdog(0.01, said.append)
    dog.beat(is_iteration=True)

    def leave(code: int, message: str, *, is_consequence: bool) -> None:
        left.append((code, message))
        dog.end()

    monkeypatch.setattr(ending, "leave", leave)
    monkeypatch.setattr(watchdog, "_write_stack", lambda: None)
    dog.start()
    dog.join(60)
    ((code, message),) = left
    assert code == 3
    assert said == [message]
    assert message.startswith("no progress for ")
