"""A base model is a local folder, a Hub id or a GGUF file; what is none of them is refused in one line."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft.model import base_folder
from sft.model.base_folder import gguf_file_in, resolve
from sft.model.weights import WeightFiles
from tests import real_parts
from tokenize_data import lock
from tokenize_data.errors import UserError


def refusal(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        resolve(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_local_folder_is_itself(tmp_path):
    assert resolve(str(tmp_path)) == tmp_path
    (tmp_path / "step1000").mkdir()
    assert resolve(str(tmp_path), "step1000") == tmp_path / "step1000"
    assert (
        refusal(str(tmp_path), "step2")
        == f"{tmp_path} has no folder 'step2' inside: name one that exists as intermediate, or leave it out"
    )


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert refusal(str(tmp_path / "file")).endswith(
        "is neither a folder nor a .gguf file: give the folder of a Hugging Face model"
    )
    assert refusal(str(tmp_path / "none")).endswith(
        "no such folder: give a Hugging Face folder, a .gguf file or a Hub id"
    )
    assert refusal("./none").endswith("no such folder: give a Hugging Face folder, a .gguf file or a Hub id")


class Hub:
    """Stands in for snapshot_download: revisions and folders of one repository, or the exception of every call."""

    def __init__(
        self, root: Path, revisions: tuple[str, ...] = (), folders: tuple[str, ...] = (), error: Exception | None = None
    ) -> None:
        self.root, self.revisions, self.error, self.calls = root, revisions, error, []
        for folder in folders:
            (root / folder).mkdir()

    def __call__(self, name: str, revision: str | None = None, allow_patterns=(), ignore_patterns=()) -> str:
        self.calls.append((name, revision, allow_patterns, ignore_patterns))
        if self.error:
            raise self.error
        if revision is not None and revision not in self.revisions:
            raise hub_error(errors.RevisionNotFoundError)
        return str(self.root)


def hub_error(kind: type[Exception], text: str = "no\nsuch thing") -> Exception:
    error = kind.__new__(kind)
    error.args = (text,)
    return error


@pytest.fixture
def hub(tmp_path, monkeypatch):
    def make(**options) -> Hub:
        made = Hub(tmp_path, **options)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", made)
        return made

    return make


def test_a_hub_id_is_fetched_without_pickles(hub, tmp_path):
    made = hub()
    assert resolve("someone/model") == tmp_path
    [(name, revision, allowed, ignored)] = made.calls
    assert (name, revision, ignored) == ("someone/model", None, ["*/*", "consolidated*.safetensors"])
    assert allowed == ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


def test_an_intermediate_is_a_revision_or_else_a_folder(hub, tmp_path):
    hub(revisions=("step3",), folders=("step4",))
    assert resolve("someone/model", "step3") == tmp_path
    assert resolve("someone/model", "step4") == tmp_path / "step4"
    assert "neither a revision nor a folder 'step5': give one that it has" in refusal("someone/model", "step5")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (errors.GatedRepoError, "is gated on the Hub: accept its terms there, then `hf auth login`"),
        (errors.RepositoryNotFoundError, "the Hub has no model 'someone/model', or a private one: check the name"),
        (
            errors.LocalEntryNotFoundError,
            "(LocalEntryNotFoundError: no such thing): check the network, or give a folder",
        ),
        (OSError, "(OSError: no such thing): check the network, or give a folder"),
    ],
)
@pytest.mark.parametrize("inner", [None, "step3"])
def test_what_the_hub_refuses_is_said_in_one_line(hub, kind, expected, inner):
    hub(error=hub_error(kind))
    assert expected in refusal("someone/model", inner)


def test_gguf_files_are_found_where_there_are_no_safetensors(tmp_path):
    file = tmp_path / "a.gguf"
    assert gguf_file_in(tmp_path) is None
    assert gguf_file_in(file) is None
    file.touch()
    assert gguf_file_in(str(tmp_path)) == gguf_file_in(file) == file
    (tmp_path / "b.gguf").touch()
    with pytest.raises(UserError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\): give the path of one of them"):
        gguf_file_in(tmp_path)
    assert gguf_file_in(file) == file
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert gguf_file_in(tmp_path) is None
    assert resolve(str(tmp_path)) == tmp_path


def test_the_package_gguf_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").touch()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    assert refusal(str(tmp_path)) == f"{tmp_path}/a.gguf is a GGUF file, which needs gguf: pip install 'megasft[gguf]'"


def test_a_broken_gguf_file_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.gguf").write_bytes(b"no gguf")
    message = refusal(str(tmp_path))
    assert f"transformers cannot read {tmp_path}/a.gguf (" in message
    assert "check that the file is complete" in message
    assert list((tmp_path / "cache" / "sft" / "models").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "a.gguf").write_bytes(b"no gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    message = refusal(str(tmp_path))
    assert (
        f"a.gguf cannot be converted into {tmp_path}/file/sft/models (Not a directory): free some space there, "
        "or set XDG_CACHE_HOME"
    ) in message


def test_one_process_converts_and_the_others_wait(tmp_path, monkeypatch, caplog):
    """The other one has it finished by the time that this one holds the lock."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.gguf").write_bytes(b"gguf")
    kept = tmp_path / "cache" / "sft" / "models" / base_folder._identity(tmp_path / "a.gguf")

    class Finished:
        def __enter__(self):
            kept.mkdir()

        def __exit__(self, *_):
            pass

    def busy(path, on_wait):
        on_wait("process 7 on here")
        return Finished()

    monkeypatch.setattr(lock, "exclusive", busy)
    with caplog.at_level(logging.INFO):
        assert resolve(str(tmp_path)) == kept
    assert "a.gguf is being converted by process 7 on here: waiting for it" in caplog.text


def test_another_file_of_the_same_name_is_converted_anew(tmp_path):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"first")
    first = base_folder._identity(file)
    assert base_folder._identity(file) == first
    os.utime(file, ns=(1, 1))
    touched = base_folder._identity(file)
    file.write_bytes(b"other")
    os.utime(file, ns=(1, 1))
    assert len({first, touched, base_folder._identity(file)}) == 3


@pytest.fixture(scope="session")
def converted() -> Path:
    """SmolLM2-135M as safetensors: converted once, kept in .cache/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(real_parts.CACHE))
        return resolve(str(real_parts.smollm2()))


def test_a_real_gguf_becomes_a_folder_that_transformers_reads(converted):
    model = AutoModelForCausalLM.from_pretrained(converted).eval()
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert model.dtype == torch.float32
    assert getattr(model.config, "quantization_config", None) is None
    files = WeightFiles(converted)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {name: files.shape(name) for name in files.names()} == expected
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = model(input_ids=ids).logits[0, -1].argmax()
    assert tokenizer.decode(best).strip() == "Paris"
    assert not [path for path in converted.parent.iterdir() if path.suffix == ".lock" or path.name.startswith("tmp")]
