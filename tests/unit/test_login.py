"""Tokens: stored where the libraries look, never shown."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sft.cli import entry
from tests.fake_hub import FakeHub, fake_hub

TOKEN = "hf_0123456789abcdefghij"
ROOT = Path(__file__).parents[2]


def login(home: Path, hub: FakeHub | None, text: str, *words: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its environment once."""
    inherited = {
        name: value for name, value in os.environ.items() if "TOKEN" not in name and "PROXY" not in name.upper()
    }
    url = hub.url if hub is not None else "http://127.0.0.1:9"
    own = {"HF_HOME": str(home / "hf"), "HOME": str(home), "HF_ENDPOINT": url, "PYTHONPATH": f"{home}:{ROOT}"}
    return subprocess.run(
        [sys.executable, "-m", "sft", "login", *words],
        env=inherited | own,
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("words", [[], ["hub"], ["trackio"]])
def test_a_token_for_the_hub(tmp_path, words):
    with fake_hub() as hub:
        hub.accepted.add(TOKEN)
        done = login(tmp_path, hub, f"{TOKEN}\n", *words)
        again = login(tmp_path, hub, f"{TOKEN}\n", *words)
    assert (done.returncode, done.stderr) == (0, "")
    name = words[0] if words else "hub"
    assert done.stdout == f"{name}: none: `sft login hub` stores one\n{name}: token stored\n"
    assert (tmp_path / "hf" / "token").read_text() == TOKEN
    assert again.stdout.startswith(f"{name}: present ({tmp_path}/hf/token)\n")
    assert TOKEN not in done.stdout + again.stdout


def test_a_token_that_the_hub_refuses(tmp_path):
    with fake_hub() as hub:
        done = login(tmp_path, hub, f"{TOKEN}\n")
    assert done.returncode == 2
    assert "sft login: the Hub rejects this token" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert not (tmp_path / "hf" / "token").exists()


def test_no_hub_in_reach(tmp_path):
    done = login(tmp_path, None, f"{TOKEN}\n")
    assert done.returncode == 3
    assert "the Hub cannot be reached" in done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_wandb_stores_its_own(tmp_path):
    (tmp_path / "wandb.py").write_text(
        "from pathlib import Path\n"
        "def login(key, relogin):\n"
        "    if key == 'bad':\n"
        "        raise ValueError(key)\n"
        "    file = Path.home() / '.netrc'\n"
        "    file.write_text(f'machine api.wandb.ai login user password {key}')\n"
        "    file.chmod(0o600)\n"
    )
    done = login(tmp_path, None, f"{TOKEN}\n", "wandb")
    assert done.stdout == "wandb: none: `sft login wandb` stores one\nwandb: token stored\n"
    assert login(tmp_path, None, f"{TOKEN}\n", "wandb").stdout.startswith(f"wandb: present ({tmp_path}/.netrc)")
    refused = login(tmp_path, None, "bad\n", "wandb")
    assert refused.returncode == 2
    assert (
        refused.stderr
        == "sft login: W&B rejects this key (ValueError): copy it again from https://wandb.ai/authorize\n"
    )


@pytest.mark.parametrize(
    ("words", "text", "said"),
    [
        (["hub"], "", "standard input holds no token"),
        (["hub"], "two words\n", "its first line has several words"),
        (["wandb"], "x\n", "wandb is not installed: pip install 'megasft[wandb]'"),
    ],
)
def test_what_is_wrong(capsys, monkeypatch, words, text, said):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert entry(["login", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_terminal_is_asked_and_may_keep_what_is_there(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    monkeypatch.setattr("getpass.getpass", lambda prompt: "")
    assert entry(["login", "hub"]) == 0
    assert capsys.readouterr().out.endswith("hub: nothing changed\n")
