"""Sweeps from the command line, with real training: killed twice they end with the table of one that was left alone."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.site import Site, make_site
from tests.faults.points import Fault, environment, wait_for
from tests.faults.rows import is_alive
from tests.faults.waiting import HANG_SECONDS, until
from tests.models import tiny_config

_SWEEP = """
recipe:
  {{checkpoint: base, run_name: orders, data: [train.jsonl], val: [val.jsonl], seq: 256, lr: 1e-3,
   global_batch: 12, iters: 14,
   eval_interval: 4, save_interval: 2, keep: 2, early_stopping: 20, tensorboard: false}}
axes: {axes}
"""
_VOLATILE = ("seconds", "run")
_GRID = """
recipe: {run_name: orders, data: [train.jsonl], val: [val.jsonl], seq: 128, lr: 1e-3, iters: 1,
         micro_batch: 2, tensorboard: false}
axes:
  model: {llama: {checkpoint: ./llama}, gemma: {checkpoint: ./gemma}, mistral: {checkpoint: ./mistral}}
  loss: [completion, full]
  samples: [60, 120, 180]
  gradient_accumulation: [2, 4]
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Site:
    return make_site(tmp_path_factory.mktemp("sweep"), smollm2)


def table(site: Site, name: str) -> list[dict[str, str]]:
    with (site.root / "sweeps" / name / "sweep.csv").open() as file:
        return [{key: value for key, value in row.items() if key not in _VOLATILE} for row in csv.DictReader(file)]


def _kill_at(site: Site, name: str, trial: str, iteration: int, number: signal.Signals) -> int:
    """Start a sweep, and send it a signal, not its trials, after an iteration of a trial, which waits until it has
    heard of it.
    """
    fault = Fault(f"iteration:{iteration}", site.root / "gates" / f"{name}-{trial}-{iteration}", f"run {trial}")
    command = [sys.executable, "-m", "sft", "sweep", f"{name}.yaml"]
    with_fault, log = site.environment(environment(fault)), site.root / "sweeps" / name / "trials" / f"{trial}.log"
    process = subprocess.Popen(
        command, cwd=site.root, env=with_fault, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert wait_for(fault, process), "it ended before its moment came"
    before = log.read_text().count("SIGTERM")
    os.kill(process.pid, number)
    assert until(lambda: log.read_text().count("SIGTERM") > before)
    fault.open()
    code = process.wait(HANG_SECONDS)
    assert until(lambda: not any(is_alive(pid) for pid in fault.pids()))
    return code


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "losses", [("full",), pytest.param(("completion", "full"), marks=pytest.mark.slow)], ids=["one", "two"]
)
def test_a_sweep_killed_twice_ends_with_the_same_table(site: Site, losses: tuple[str, ...]):
    whole_name, name = f"whole{len(losses)}", f"killed{len(losses)}"
    for which in (whole_name, name):
        (site.root / f"{which}.yaml").write_text(_SWEEP.format(axes=f"{{loss: [{', '.join(losses)}]}}"))
    done = site.sft("sweep", f"{whole_name}.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "full: finished" in done.stdout
    runs, (first, *_, last) = site.root / "sweeps" / name / "runs", (*losses, losses[-1])
    assert _kill_at(site, name, first, 4, signal.SIGKILL) == -signal.SIGKILL
    assert not any(runs.glob(f"{first}/*/hf"))
    assert _kill_at(site, name, last, 9, signal.SIGTERM) == 75
    assert not any(runs.glob(f"{last}/*/hf"))
    again = site.sft("sweep", f"{name}.yaml")
    assert again.returncode == 0, again.stdout + again.stderr
    assert ("1 of 2 trials are done already" in again.stdout) == (len(losses) == 2)
    assert "full: goes on" in again.stdout
    whole, killed = table(site, whole_name), table(site, name)
    assert whole == killed
    assert [row["state"] for row in whole] == ["finished"] * len(losses)
    assert [row["iterations"] for row in whole] == ["14"] * len(losses)
    assert all(row["best_val_loss"] for row in whole)
    assert (
        len(list((site.root / "sweeps" / whole_name / "tokenized").glob("orders-????????"))) == 1
    )  # tokenised once for all
    assert (site.root / "sweeps" / whole_name / "axis-loss.png").exists() == (len(losses) == 2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_grid_of_models_losses_samples_and_accumulation(site: Site, family):
    for name, tokenizer in (("llama", "llama3"), ("gemma", "gemma"), ("mistral", "mistral")):
        torch.manual_seed(0)
        config = tiny_config(name)
        config.vocab_size = 2000
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(site.root / name)
        for file in family(tokenizer).iterdir():
            (site.root / name / file.name).write_bytes(file.read_bytes())
    rows = (site.root / "train.jsonl").read_text()
    (site.root / "train.jsonl").write_text(rows * 4)
    (site.root / "grid.yaml").write_text(_GRID)
    command = [sys.executable, "-m", "sft", "sweep", "grid.yaml", "--parallel", "2"]
    done = subprocess.run(command, cwd=site.root, env=site.environment(), capture_output=True, text=True, timeout=3600)
    (site.root / "train.jsonl").write_text(rows)
    assert done.returncode == 0, done.stdout + done.stderr
    found = table(site, "grid")
    assert len(found) == 36
    assert {row["state"] for row in found} == {"finished"}
    assert len({row["best_val_loss"] for row in found}) >= 30
    assert len(list((site.root / "sweeps" / "grid" / "tokenized").glob("orders-????????"))) == 9
