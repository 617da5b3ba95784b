"""Loading a base model's tokenizer: as it stands, or converted once by transformers."""

from __future__ import annotations

import json
import subprocess

import pytest

from tokenize_data import tokenizer as tokenizers
from tokenize_data.tokenizer import load_tokenizer


def test_a_conversion_is_kept(mistral_v1, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = load_tokenizer(str(mistral_v1))
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: calls.append(arguments))
    assert load_tokenizer(str(mistral_v1)).fingerprint == first.fingerprint
    assert calls == []
    assert len(list((tmp_path / "sft" / "tokenizers").iterdir())) == 1


def test_a_home_that_cannot_be_written(mistral_v1, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load_tokenizer(str(mistral_v1)).vocabulary_size == 32_000


def test_a_verbatim_folder_is_not_converted(family, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: pytest.fail("converted"))
    assert load_tokenizer(str(family("llama3"))).special("eos_token") == "<|end_of_text|>"


def test_tokens_that_only_the_configuration_declares_need_transformers(family, tmp_path, monkeypatch):
    folder = tmp_path / "declared"
    folder.mkdir()
    source = family("gpt2")
    (folder / "tokenizer.json").write_text((source / "tokenizer.json").read_text())
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["extra_special_tokens"] = ["<|new|>"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert load_tokenizer(str(folder)).backend.token_to_id("<|new|>") is not None


@pytest.mark.parametrize("place", ["jinja", "config", "list"])
def test_where_chat_templates_are_found(family, tmp_path, place):
    folder = tokenizers.Path(family("gpt2"))
    copy = tmp_path / place
    copy.mkdir()
    (copy / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if place == "jinja":
        (copy / "chat_template.jinja").write_text("T")
    else:
        config["chat_template"] = (
            "T" if place == "config" else [{"name": "rag", "template": "R"}, {"name": "default", "template": "T"}]
        )
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(str(copy)).chat_template == "T"


def test_extending_leaves_the_original_alone(family):
    base = load_tokenizer(str(family("llama2")))
    grown = base.extended(("<s>", "<|x|>", "<|x|>"))
    assert grown.added == ("<|x|>",)
    assert base.backend.token_to_id("<|x|>") is None
    assert grown.vocabulary_size == base.vocabulary_size + 1
    assert grown.fingerprint != base.fingerprint
    assert base.extended(("<s>",)) is base
