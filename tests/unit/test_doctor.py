"""What `sft doctor` finds, and that its training step is a real one."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from sft.cli import entry
from sft.commands import doctor
from sft.resolve import health

SECRET = "hf_0123456789abcdefghij"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "HF_TOKEN_PATH", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_tiny_model_is_trained_here(tmp_path, capsys):
    assert entry(["doctor", "--json", "--folder", str(tmp_path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["training_works"] is True
    topics = {one["topic"]: one for one in told["findings"]}
    assert {"python", "torch", "extra wandb", "cpu", "gpus", "memory", "disk checkpoints", "token hub"} <= topics.keys()
    assert topics["training"]["text"].startswith("a tiny model was trained for one iteration in ")
    assert "core" in topics["cpu"]["text"]
    assert "AVX-512" in topics["cpu"]["text"]
    assert topics["package sft"]["level"] == "ok"


def test_training_that_fails_is_a_reason_and_3(capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr("sft.verify.tiny.write_tiny_base", lambda folder: folder.mkdir())
    assert entry(["doctor"]) == 3
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("!!    training             fails: ")
    assert last.endswith("(exit code 2)")


def test_the_page_lists_findings_by_level(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "try_training", lambda: None)
    assert entry(["doctor"]) == 0
    marks = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert marks <= {"ok", "note", "!!"}


def test_versions_are_compared_with_our_ranges(monkeypatch):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "2.1.0" if name == "torch" else real(name))
    found = {one.topic: one for one in health.packages()}
    assert found["torch"].level == "problem"
    assert found["torch"].text == "2.1.0 does not fit >=2.11: pip install 'torch>=2.11'"
    assert found["transformers"].level == "ok"


def missing(name: str) -> str:
    raise metadata.PackageNotFoundError(name)


def test_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(metadata, "version", missing)
    assert {one.level for one in health.packages() if one.topic != "python"} == {"problem"}
    extras = {one.topic: one for one in health.extras()}
    assert extras["extra wandb"].text == "not installed (wandb): pip install 'megasft[wandb]'"
    assert extras["extra wandb"].level == "note"
    assert "extra dev" not in extras


def test_from_a_folder_of_sources(monkeypatch):
    monkeypatch.setattr(metadata, "metadata", missing)
    monkeypatch.setattr(metadata, "requires", missing)
    (found,) = health.packages()
    assert found.text.startswith("not installed as a package")
    assert health.extras() == []


def test_tokens_are_present_or_not_and_never_shown(tmp_path, monkeypatch):
    assert {one.level for one in health.tokens()} == {"note"}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(SECRET)
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    (tmp_path / ".netrc").chmod(0o600)
    texts = [one.text for one in health.tokens()]
    assert texts == [f"present ({tmp_path}/hf/token)", f"present ({tmp_path}/.netrc)", f"present ({tmp_path}/hf/token)"]
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert health.token_of("hub").text == "present (HF_TOKEN)"
    (tmp_path / ".netrc").write_text("machine\n")
    assert health.wandb_netrc() is None


def test_a_machine_without_proc(monkeypatch):
    def none(self: Path, *_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", none)
    assert health.memory()[0].level == "note"


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(health.os, "access", lambda *_: False)
    assert [one.text for one in health.disk(tmp_path / "new")] == [f"{tmp_path} cannot be written"] * 2
