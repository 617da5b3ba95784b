"""The first word of the command line, before any command is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sft.cli import COMMANDS, entry

_ASK = """
import os, sys
from sft.cli import entry
assert entry(["-h"]) == 0
print("torch" in sys.modules, os.environ["OMP_WAIT_POLICY"])
"""


def ask(**environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", _ASK], env=inherited | environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_help_names_every_command_and_needs_no_torch():
    text = ask()
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert text.endswith("False passive\n")  # torch reads how its threads are to wait when it is imported


def test_how_threads_wait_is_the_user_s_to_say():
    assert ask(OMP_WAIT_POLICY="active").endswith("False active\n")


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_no_argument_is_a_question(argv: list[str], capsys: pytest.CaptureFixture[str]):
    assert entry(argv) == (0 if argv else 2)
    assert "commands:" in capsys.readouterr().out


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        entry(["evalute"])
    assert ended.value.code == 2
    assert "evaluate" in capsys.readouterr().err
