"""The first word of the command line, before any command is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sft.cli import COMMANDS, entry
from sft.config.settings import Settings
from sft.launcher import hostfile
from sft.resolve import data_stage
from sft.spec.exit_codes import EXIT_FINISHED
from sft.spec.workers import set_library_defaults
from tokenize_data import cli as tokenize_cli

_ASK = """
import os, sys
from sft.cli import entry
assert entry(["-h"]) == 0
print("torch" in sys.modules, os.environ["OMP_WAIT_POLICY"])
"""


def ask(**environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", _ASK], env=inherited | environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_help_names_every_command_and_needs_no_torch():
    text = ask()
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert text.endswith("False passive\n")  # torch reads how its threads are to wait when it is imported


def test_how_threads_wait_is_the_user_s_to_say():
    assert ask(OMP_WAIT_POLICY="active").endswith("False active\n")


def test_torch_s_own_messages_are_for_those_who_want_a_traceback():
    quiet, given, wanted = {}, {"TORCH_CPP_LOG_LEVEL": "INFO"}, {"SFT_TRACEBACK": "1"}
    for environment in (quiet, given, wanted):
        set_library_defaults(environment)
    assert [one.get("TORCH_CPP_LOG_LEVEL") for one in (quiet, given, wanted)] == ["ERROR", "INFO", None]


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_no_argument_is_a_question(argv: list[str], capsys: pytest.CaptureFixture[str]):
    assert entry(argv) == (0 if argv else 2)
    assert "commands:" in capsys.readouterr().out


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        entry(["evalute"])
    assert ended.value.code == 2
    assert "evaluate" in capsys.readouterr().err


def crash(*_: object) -> int:
    raise ZeroDivisionError("in two\nlines")


def test_a_crash_is_one_line_and_no_finished_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sft.commands.report.run", crash)
    assert entry(["report", "x"]) == 3
    assert capsys.readouterr().err == "sft report: ZeroDivisionError: in two lines; SFT_TRACEBACK=1 shows where\n"
    monkeypatch.setattr("sft.commands.report.add_flags", crash)
    assert entry(["report", "x"]) == 3
    monkeypatch.setattr(tokenize_cli, "run", crash)
    assert tokenize_cli.entry(["--run_name", "r"]) == 3
    assert capsys.readouterr().err.endswith(
        "tokenize_data: ZeroDivisionError: in two lines; SFT_TRACEBACK=1 shows where\n"
    )


def test_a_crash_with_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("SFT_TRACEBACK", "1")
    monkeypatch.setattr("sft.commands.report.run", crash)
    assert entry(["report", "x"]) == 3
    err = capsys.readouterr().err
    assert "in crash" in err
    assert err.endswith("shows where\n")


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("exit 0", 0, ""),
        ("exit 2", 2, ""),
        ("exit 3", 3, ""),
        ("exit 1", 3, "sft train: the data stage (tokenize_data) crashed (exit code 1)\n"),
        ("exit 247", 3, "sft train: the data stage (tokenize_data) crashed (exit code 247)\n"),
        (
            "kill -9 $$",
            3,
            "sft train: the data stage (tokenize_data) was killed (SIGKILL): out of memory, or from outside?\n",
        ),
        (
            "kill -40 $$",
            3,
            "sft train: the data stage (tokenize_data) was killed (signal 40): out of memory, or from outside?\n",
        ),
    ],
)
def test_how_the_data_stage_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], end: str, code: int, said: str
):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{end}\n")
    program.chmod(0o755)
    monkeypatch.setattr(data_stage.sys, "executable", str(program))
    monkeypatch.setattr(data_stage, "tokenizer_flags", lambda config, base: [])
    config = Settings.of(run_name="r")
    base: Any = SimpleNamespace(config={})
    assert data_stage.tokenise(config, base) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("codes", "code"), [([0, 0], 0), ([1, 1], 1), ([0, 2], 2), ([0, 127], 3), ([-9, 0], 3), ([75, 3], 75)]
)
def test_how_hosts_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: list[int], code: int):
    (tmp_path / "hosts").write_text("one\ntwo\n")
    monkeypatch.setattr(hostfile, "_Node", lambda *_: None)
    monkeypatch.setattr(hostfile, "_wait", lambda _: (codes, None))
    assert hostfile.run(Settings.of(run_name="r", hostfile=str(tmp_path / "hosts")), []) == code
    assert EXIT_FINISHED == 1
