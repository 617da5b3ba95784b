"""Uploads to a Hub on this machine: what arrives, what the card says, and that a failed one can be repeated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sft.checkpoint import hub
from sft.checkpoint.card import card
from tests.fake_hub import FakeHub, fake_hub
from tokenize_data.errors import UserError

_WEIGHTS = bytes(range(256)) * 8


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a finished run leaves."""
    folder, shards = tmp_path / "llama-base-orders", tmp_path / "tokenized" / "orders"
    (folder / "hf").mkdir(parents=True)
    shards.mkdir(parents=True)
    (folder / "hf" / "model.safetensors").write_bytes(_WEIGHTS)
    (folder / "hf" / "config.json").write_text("{}")
    training = {
        "base": "someone/base",
        "run_name": "orders",
        "resolved": {"data_folder": str(shards)},
        "config": {"loss_mask": 1.0},
        "result": {"iterations": 40, "loss": 1.25, "val_loss": 1.5, "val_perplexity": 4.48, "val_accuracy": 0.5},
        "versions": {"torch": "2.13"},
    }
    (folder / "hf" / "training.json").write_text(json.dumps(training))
    (folder / "recipe.yaml").write_text("run_name: orders\n")
    (folder / "loss.png").write_bytes(b"\x89PNG")
    entry = {"name": "orders", "format": "qa", "files": [{"name": "/home/somebody/secret/train.jsonl", "rows": 1234}]}
    (shards / "manifest.json").write_text(json.dumps({"datasets": [entry]}))
    return folder


@pytest.fixture(scope="module")
def site_hub():
    with fake_hub() as site:
        yield site


def export(site: FakeHub, run: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported."""
    code = (
        "import sys; from pathlib import Path; from sft.checkpoint import hub; from sft.cli import entry; "
        "sys.exit(entry(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "export", str(run), *flags]
    home = {
        "HF_ENDPOINT": site.url,
        "HF_HOME": str(run.parent / "home"),
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run(
        command, env={**os.environ, **home, **environment}, capture_output=True, text=True, timeout=600
    )


def test_an_upload_that_fails_is_repeated_and_is_whole(site_hub: FakeHub, run: Path):
    site_hub.fail_at = "/commit/"
    failed = export(site_hub, run, "--push_to_hub", "me/orders")
    assert failed.returncode == 2
    (line,) = [text for text in failed.stderr.splitlines() if text]
    assert f"{run / 'hf'} could not be uploaded as me/orders" in line
    assert f"try again with `sft export {run} --push_to_hub me/orders`" in line
    assert site_hub.files("me/orders") == {}
    assert not hub.is_pushed(run, "me/orders")
    assert (run / "hf" / "model.safetensors").read_bytes() == _WEIGHTS
    site_hub.fail_at = None
    done = export(site_hub, run, "--push_to_hub", "me/orders")
    assert done.returncode == 0, done.stderr
    assert f"uploaded  {site_hub.url}/me/orders" in done.stdout
    files = site_hub.files("me/orders")
    assert set(files) == {"model.safetensors", "config.json", "training.json", "loss.png", "recipe.yaml", "README.md"}
    assert files["model.safetensors"] == _WEIGHTS
    assert site_hub.repositories["me/orders"]["private"] is True
    assert site_hub.repositories["me/orders"]["commits"] == 1
    assert site_hub.tokens == {"Bearer hf_test"}
    assert hub.is_pushed(run, "me/orders")
    assert not hub.is_pushed(run, "me/other")
    assert not (run / "hf" / "README.md").exists()


def test_without_a_token_nothing_is_asked(site_hub: FakeHub, run: Path):
    before = len(site_hub.asked)
    refused = export(site_hub, run, "--push_to_hub", "me/none", HF_TOKEN="")
    assert refused.returncode == 2
    assert "--push_to_hub me/none needs a token: `hf auth login`, or HF_TOKEN in the environment" in refused.stderr
    assert len(site_hub.asked) == before


def test_the_card(run: Path):
    text = card(run, "me/orders", is_adapter=False, has_curve=True)
    assert 'library_name: "transformers"' in text
    assert 'base_model: "someone/base"' in text
    assert "| validation loss | 1.5000 |" in text
    assert "| accuracy of answer tokens | 50.0% |" in text
    assert "| training | orders | train.jsonl | qa | 1,234 |" in text
    assert "/home/somebody" not in text
    assert "Learnt was everything." in text
    assert "![training and validation loss](loss.png)" in text
    assert "```yaml\nrun_name: orders\n```" in text
    (run / "hf").rename(run / "adapter")
    assert hub.model_folder(run) == run / "adapter"
    assert 'library_name: "peft"' in card(run, "me/orders", is_adapter=True, has_curve=False)


def test_a_name_that_cannot_be(run: Path):
    with pytest.raises(UserError, match="cannot be the name of a model: use owner/name"):
        hub.push(run, run / "hf", "a/b/c", public=False, say=print)
