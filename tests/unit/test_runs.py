"""The table of runs: one row for each, whatever state its files are in."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sft.cli import entry
from sft.commands import runs as command
from sft.spec.run_folder import write_run_toml, write_status


def make_run(folder: Path, state: Any = "running") -> Path:
    folder.mkdir(parents=True)
    write_run_toml(folder, config={"checkpoint": "meditron", "size": "7"}, resolved={"iterations": 12}, versions={})
    write_status(folder, state=state, iteration=2, iterations=12, reason="loss is NaN" if state == "failed" else "")
    records = [
        {"iteration": 1, "loss": 2.5, "seconds": 30.0},
        {"iteration": 2, "loss": 2.0, "val_loss": 2.25, "seconds": 31.0},
        {"iteration": 3, "loss": 1.5, "seconds": 32.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def rows_of(root: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    assert entry(["runs", str(root), "--json"]) == 0
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


def test_a_row_for_each_run(tmp_path, capsys):
    make_run(tmp_path / "one")
    make_run(tmp_path / "sweep" / "two", "failed")
    (tmp_path / "one" / "step-0000002").mkdir()
    (tmp_path / "one" / "step-0000002" / "run.json").write_text("{}")  # not a run of its own
    found = rows_of(tmp_path, capsys)
    assert list(found) == ["one", "sweep/two"]
    assert found["one"] == {
        "name": "one",
        "folder": str(tmp_path / "one"),
        "state": "running",
        "iteration": 3,
        "iterations": 12,
        "loss": 1.5,
        "val_loss": 2.25,
        "seconds": 93.0,
        "base": "meditron 7",
        "reason": "",
    }
    assert (found["sweep/two"]["state"], found["sweep/two"]["reason"]) == ("failed", "loss is NaN")
    assert entry(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "state", "iteration", "loss", "val", "loss", "time", "base"]
    assert lines[1].split() == ["one", "running", "3/12", "1.5000", "2.2500", "0:01:33", "meditron", "7"]


@pytest.mark.parametrize("name", ["status.json", "run.toml", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe", b'{"iteration": "x"}', b"resolved = 1", None])
def test_damaged_files_leave_a_row(tmp_path, capsys, name, content):
    run = make_run(tmp_path / "one")
    (run / name).unlink()
    if content is None:
        (run / name).mkdir()
    else:
        (run / name).write_bytes(content)
    assert rows_of(tmp_path, capsys).keys() == {"one"}
    assert entry(["runs", str(tmp_path)]) == 0


def test_a_torn_line_is_left_out(tmp_path, capsys):
    run = make_run(tmp_path / "one")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "lo')
    assert rows_of(tmp_path, capsys)["one"]["iteration"] == 3


def test_a_run_with_a_model_alone_is_finished(tmp_path, capsys):
    run = make_run(tmp_path / "one")
    (run / "status.json").unlink()
    assert rows_of(tmp_path, capsys)["one"]["state"] == "unknown"
    (run / "hf").mkdir()
    assert rows_of(tmp_path, capsys)["one"]["state"] == "finished"


def test_nothing_there(tmp_path, capsys):
    assert entry(["runs", str(tmp_path)]) == 0
    assert "no runs below" in capsys.readouterr().out
    assert entry(["runs", str(tmp_path / "none")]) == 2
    assert "none: no such folder: give the folder that holds runs" in capsys.readouterr().err
    assert entry(["runs", str(tmp_path), "--json", "--watch"]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_watching_shows_what_is_new(tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "one")

    def sleep(seconds: float) -> None:
        if (tmp_path / "two").exists():
            raise KeyboardInterrupt
        make_run(tmp_path / "two")

    monkeypatch.setattr(time, "sleep", sleep)
    assert entry(["runs", str(tmp_path), "--watch"]) == 0
    assert "two" in capsys.readouterr().out
    assert command._SECONDS > 0


def test_the_version_needs_no_torch():
    program = "import sys; from sft.cli import entry; assert entry(['--version']) == 0; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = dict(line.split() for line in done.stdout.splitlines()[:-1])
    assert list(lines) == ["megasft", "torch", "transformers", "deepspeed"]
    assert done.stdout.endswith("\nFalse\n")
