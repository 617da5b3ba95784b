"""What a run writes beside its checkpoints while it trains."""

from __future__ import annotations

import io
import json
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from rich.console import Console

from sft.worker.watch import _FirstWatch
from tokenize_data.errors import UserError


@pytest.fixture
def watch(tmp_path):
    screen = io.StringIO()
    with ExitStack() as stack:
        made = _FirstWatch(SimpleNamespace(folder=tmp_path, iterations=9), Console(file=screen, width=200), stack)
        made.screen = screen
        yield made


def test_a_status_that_cannot_be_written_is_one_warning_while_training(watch, tmp_path):
    watch.has_started = True
    (tmp_path / "status.json").mkdir()
    watch.status("running")
    watch.status("running")
    (tmp_path / "status.json").rmdir()
    watch.iteration = 4
    watch.status("running")
    assert json.loads((tmp_path / "status.json").read_text())["iteration"] == 4
    said = watch.screen.getvalue()
    assert said.count("warning: ") == 1
    assert said.startswith(f"warning: status.json was not updated: cannot write {tmp_path / 'status.json'}: Is a dir")
    assert (tmp_path / "warnings.log").read_text().startswith("status.json was not updated: cannot write")


def test_before_training_it_is_an_error(watch, tmp_path):
    (tmp_path / "status.json").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*status\.json"):
        watch.status("running")
