"""A run that is killed goes on, on another layout, as if nothing had been; a checkpoint becomes a model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.site import Site, make_site
from tests.faults.points import Fault, environment, wait_for
from tests.faults.rows import is_alive
from tests.faults.waiting import until

_FIXED = [
    "--checkpoint",
    "base",
    "--run_name",
    "orders",
    "--global_batch",
    "12",
    "--lr",
    "1e-3",
    "--seq",
    "256",
    "--iters",
    "6",
]
_RUN = "llama-base-orders-seq256"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Site:
    site = make_site(tmp_path_factory.mktemp("resume"), smollm2)
    done = site.train("--iters", 6, "--save_interval", 2, "--keep", 3)
    assert done.returncode == 0, done.stderr
    return site


def _kill_after(site: Site, run: str, iteration: int, *flags: str) -> None:
    """Start a run and kill all its processes after an iteration. What was saved before it is on the disk."""
    command = [sys.executable, "-m", "sft", *_FIXED, "--data", "train.jsonl", "--val", "val.jsonl", *flags]
    fault = Fault(f"iteration:{iteration}", site.root / "gates" / run, "rank *")
    process = subprocess.Popen(
        command,
        cwd=site.root,
        env=site.environment(environment(fault)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert wait_for(fault, process)
    os.killpg(process.pid, signal.SIGKILL)  # its workers end with it
    process.wait()
    assert until(lambda: not any(is_alive(pid) for pid in fault.pids()))


def test_a_killed_run_goes_on_with_another_layout(site: Site):
    _kill_after(
        site, f"{_RUN}-killed", 5, "--save_interval", "2", "--id", "killed", "--nproc_per_node", "2", "--pp", "2"
    )
    assert (site.root / "checkpoints" / f"{_RUN}-killed" / "step-0000002").is_dir()
    assert not (site.root / "checkpoints" / f"{_RUN}-killed" / "hf").exists()
    done = site.train("--iters", 6, "--save_interval", 2, "--id", "killed")
    assert done.returncode == 0, done.stderr
    assert "resumed after iteration " in done.stdout
    assert "made with tp 1 x pp 2 x dp 1" in done.stdout
    whole, resumed = site.metrics(_RUN), site.metrics(f"{_RUN}-killed")
    assert [record["iteration"] for record in resumed] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(whole, resumed, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert other["lr"] == one["lr"]


def test_checkpoints_are_kept_as_told(site: Site):
    folder = site.root / "checkpoints" / _RUN
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-0000002", "step-0000004", "step-0000006"]
    assert (folder / "latest").read_text().strip() == "step-0000006"
    assert not list(folder.glob("**/*.pt"))


def test_a_checkpoint_is_exported_as_the_run_would(site: Site):
    done = site.sft("export", f"checkpoints/{_RUN}", "--out", "exported")
    assert done.returncode == 0, done.stderr
    assert "model of iteration 6: exported" in done.stdout
    run = site.root / "checkpoints" / _RUN / "hf"
    mine, theirs = load_file(site.root / "exported" / "model.safetensors"), load_file(run / "model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (site.root / "exported" / name).read_bytes() == (run / name).read_bytes()
    earlier = site.sft("export", f"checkpoints/{_RUN}", "--out", "earlier", "--iteration", "4", "--dtype", "bf16")
    assert earlier.returncode == 0, earlier.stderr
    assert load_file(site.root / "earlier" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_a_checkpoint_answers_as_its_exported_model(site: Site, capsys: pytest.CaptureFixture[str]):
    import shutil

    from sft.cli import entry

    run = site.root / "checkpoints" / _RUN
    unfinished = shutil.copytree(run, site.root / "unfinished", ignore=shutil.ignore_patterns("hf"))
    answers = []
    for model in (run, unfinished, unfinished / "step-0000006"):
        assert entry(["generate", str(model), "--prompt", "How is it written?", "--max_tokens", "6"]) == 0
        answers.append(capsys.readouterr().out)
    assert len(set(answers)) == 1
    assert not list(unfinished.glob(".asked*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["checkpoints/nothing"],
            "checkpoints/nothing has no checkpoint (step-...): give the folder of a run that has saved one",
        ),
        (
            [f"checkpoints/{_RUN}", "--out", "e", "--iteration", "5"],
            "has no step-0000005: it has step-0000002, step-0000004, step-0000006",
        ),
        ([f"checkpoints/{_RUN}"], "hf exists: give another --out, or remove it first"),
    ],
)
def test_what_cannot_be_exported_is_said(site: Site, flags: list[str], message: str):
    done = site.sft("export", *flags)
    assert done.returncode == 2
    assert message in done.stderr


def test_epochs_may_grow_and_data_may_not_change(site: Site):
    import shutil

    run = site.root / "checkpoints" / _RUN
    shutil.copytree(run, site.root / "checkpoints" / f"{_RUN}-longer", ignore=shutil.ignore_patterns("hf"))
    other = site.train("--iters", 6, "--id", "longer", "--seed", "5")
    assert other.returncode == 2
    assert "was made with seed 1234, this run has 5: use the same, or start another run with --id" in other.stderr
    done = site.train("--iters", 8, "--id", "longer")
    assert done.returncode == 0, done.stderr
    assert [record["iteration"] for record in site.metrics(f"{_RUN}-longer")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert "resumed after iteration 6" in done.stdout


def test_early_stopping_exports_the_best(site: Site):
    rate = ["--lr", "0.3", "--min_lr", "0.3", "--schedule", "constant", "--warmup_fraction", "0"]
    done = site.train("--iters", 12, *rate, "--eval_interval", 1, "--early_stopping", 2, "--id", "early")
    assert done.returncode == 0, done.stderr
    records = site.metrics(f"{_RUN}-early")
    losses = [record["val_loss"] for record in records]
    best = losses.index(min(losses)) + 1
    assert len(records) == best + 2
    assert "stopped early: 2 validations without a better loss than" in done.stdout
    assert f"the model of iteration {best} is exported" in done.stdout
    assert (site.root / "checkpoints" / f"{_RUN}-early" / f"step-{best:07d}").is_dir()


def test_data_that_is_tokenised_anew_does_not_disturb_a_run(site: Site):
    """Validation and training data are replaced before the first validation; the run goes on, and its checkpoint can be
    exported.
    """
    name, run = "anew", "llama-base-anew-seq256"
    folder = site.root / "checkpoints" / run
    flags = ["--checkpoint", "base", "--run_name", name, "--data", "train.jsonl", "--val", "val.jsonl", "--seq", "256"]
    command = [sys.executable, "-m", "sft", *flags, "--global_batch", "4", "--iters", "4000", "--eval_interval", "50"]
    process = subprocess.Popen(
        command, cwd=site.root, env=site.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        _until(process, lambda: (folder / "metrics.jsonl").exists() and len(site.metrics(run)) >= 2)
        process.send_signal(signal.SIGSTOP)
        assert not any("val_loss" in record for record in site.metrics(run))
        other = [
            "--data",
            "val.jsonl",
            "--val",
            "train.jsonl",
            "--retokenize",
            "--checkpoint",
            "base",
            "--run_name",
            name,
            "--seq",
            "256",
        ]
        made = subprocess.run(
            [sys.executable, "-m", "tokenize_data", *other], cwd=site.root, env=site.environment(), capture_output=True
        )
        assert made.returncode == 0, made.stderr
        process.send_signal(signal.SIGCONT)
        _until(process, lambda: any("val_loss" in record for record in site.metrics(run)))
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, err
    done = site.sft("export", str(folder), "--out", "anew-hf")
    assert done.returncode == 0, done.stderr
    assert (site.root / "anew-hf" / "tokenizer_config.json").exists()


def _until(process: subprocess.Popen, holds: Callable[[], bool]) -> None:
    while not holds():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
