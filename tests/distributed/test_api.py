"""The examples of docs/api.md as one script, and what they leave against what the commands leave."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sft
from tests.distributed.launch import ROOT
from tests.distributed.site import Site, make_site

NAME = "llama-smollm2-orders-ep2-seq256"
TIMES = {"seconds", "tokens_per_second", "val_seconds"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Site:
    made = make_site(tmp_path_factory.mktemp("site"), smollm2)
    (made.root / "models").mkdir()
    (made.root / "base").rename(made.root / "models" / "smollm2")
    return made


@pytest.fixture(scope="module")
def page(site: Site) -> subprocess.CompletedProcess[str]:
    """The page's examples, run from top to bottom as a script without a `__main__` guard."""
    examples = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "api.md").read_text(), re.M | re.S)
    assert len(examples) == 5
    (site.root / "page.py").write_text("\n".join(examples))
    done = subprocess.run(
        [sys.executable, "page.py"],
        cwd=site.root,
        env=site.environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def run(site: Site, page: subprocess.CompletedProcess[str]) -> sft.Run:
    return sft.load_run(site.root / "checkpoints" / NAME)


def test_the_page_prints_what_it_says(site: Site, page: subprocess.CompletedProcess[str], run: sft.Run):
    lines = page.stdout.splitlines()
    assert f"{site.root / 'checkpoints' / NAME} finished" in lines
    assert str([record["loss"] for record in run.metrics]) in lines
    assert f"50 {json.loads((site.root / 'tokenized/orders/manifest.json').read_text())['trained_tokens']} 7" in lines
    assert f"# {lines[-1]}\n" in (ROOT / "docs" / "api.md").read_text()
    assert "iteration 2/2" in page.stdout, "progress, as on the command line"
    assert "Traceback" not in page.stderr


def test_its_losses_weights_and_folder_are_those_of_the_command(site: Site, run: sft.Run):
    flags = ["--data", "train.jsonl", "--val", "val.jsonl", "--epochs", 2, "--lr", "1e-4", "--seq", 256]
    train = ["--checkpoint", "models/smollm2", "--run_name", "orders", *flags]
    again = site.sft(*train)
    assert (again.returncode, again.stderr.count("this run is finished")) == (1, 1), "it is the same run"
    done = site.sft(*train, "--id", "command")
    assert done.returncode == 0, done.stdout + done.stderr
    command = sft.load_run(site.root / "checkpoints" / f"{NAME}-command")
    assert command.metrics == site.metrics(f"{NAME}-command")
    assert [record["iteration"] for record in run.metrics] == [1, 2]
    for mine, theirs in zip(run.metrics, command.metrics, strict=True):
        assert {key: mine[key] for key in mine.keys() - TIMES} == {key: theirs[key] for key in theirs.keys() - TIMES}
    assert run.status | {"updated": ""} == command.status | {"updated": ""}
    assert {path.name for path in command.folder.iterdir()} == {path.name for path in run.folder.iterdir()} - {
        "evaluation"
    }
    expected = AutoModelForCausalLM.from_pretrained(command.folder / "hf").state_dict()
    found = run.model().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert run.tokenizer().chat_template == command.tokenizer().chat_template is not None


def test_a_finished_run_is_returned_with_the_command_s_line(
    site: Site, run: sft.Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(site.root)
    monkeypatch.setenv("PYTHONPATH", site.environment()["PYTHONPATH"])
    again = sft.fine_tune(checkpoint="models/smollm2", run_name="orders", val=["val.jsonl"], epochs=2, seq=256)
    assert again.folder.resolve() == run.folder.resolve()
    err = capfd.readouterr().err
    assert f"sft train: this run is finished: its model is in checkpoints/{NAME}/hf; --id NAME repeats it" in err


def test_scores_are_those_of_the_command(site: Site, run: sft.Run):
    out = site.root / "scores"
    flags = ["--data", "val.jsonl", "--compare", "base", "--max_tokens", 16, "--out", out]
    done = site.sft("evaluate", run.folder, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    mine, theirs = (
        json.loads((folder / "scores.json").read_text()) | {"command": []}
        for folder in (run.folder / "evaluation", out)
    )
    assert mine == theirs
    assert [model["label"] for model in mine["models"]] == ["base", NAME]
