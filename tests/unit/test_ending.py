"""How a worker ends, and what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from sft.launcher import processes
from sft.spec.errors import CheckpointError, TrainingError
from sft.spec.exit_codes import EXIT_FAILED, EXIT_USER_ERROR
from sft.worker.ending import guarded, reason_of
from tokenize_data.errors import UserError

_WORKER = "from sft.worker.ending import guarded; print('works', guarded('train', lambda: 0))"


@pytest.mark.skipif(sys.platform != "linux", reason="the signal of a parent's death is Linux's")
@pytest.mark.parametrize("is_ours", [True, False])
def test_a_worker_whose_launcher_was_gone_before_it_looked_is_killed(tmp_path, is_ours):
    """Whoever has adopted it: process 1, or another that adopts."""
    launcher = os.getpid() if is_ours else 2**22 - 1
    environment = {
        **os.environ,
        "SFT_NOTES": str(tmp_path),
        "SFT_LAUNCHER": str(launcher),
        "WORLD_SIZE": "1",
        "RANK": "0",
    }
    done = subprocess.run([sys.executable, "-c", _WORKER], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == ((0, "works 0\n") if is_ours else (-signal.SIGKILL, ""))


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("no such file"), EXIT_USER_ERROR, "no such file"),
        (CheckpointError("the disk is full"), EXIT_FAILED, "the disk is full"),
        (TrainingError("the loss is not finite"), EXIT_FAILED, "the loss is not finite"),
        (torch.OutOfMemoryError("CUDA out of memory"), EXIT_FAILED, "out of GPU memory: use a smaller --micro_batch"),
        (KeyError("x"), EXIT_FAILED, "KeyError ("),
    ],
)
def test_what_stopped_a_worker_decides_exit_code_and_line(monkeypatch, capsys, error, code, text):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("SFT_NOTES", raising=False)

    def fail():
        raise error

    assert reason_of(error).startswith(text)
    assert guarded("plan", fail) == code
    assert text in capsys.readouterr().err


_COMPARES = """
import os, sys
from sft.worker.ending import guarded
def compare():
    if os.environ["RANK"] == "0":
        print("they differ")
    return 3 if os.environ["RANK"] == "0" else 0
sys.exit(guarded("parity", compare))
"""


def test_a_command_whose_result_is_an_exit_code_needs_no_further_line(capfd):
    code = processes.start("parity", ["-c", _COMPARES], processes.NodeSlot(per_node=2))
    out, err = capfd.readouterr()
    assert (code, out, err) == (3, "they differ\n", "")


def test_a_result_does_not_hide_why_another_process_failed(tmp_path):
    note = {"code": EXIT_FAILED, "is_consequence": False}
    for rank, message in enumerate(("", "the disk is full")):
        (tmp_path / f"{rank}.json").write_text(json.dumps({**note, "message": message, "time": rank}))
    assert processes._how_they_ended(tmp_path, [3, 3], None) == (EXIT_FAILED, "the disk is full")
