"""Tokenizer files that crash the library, do not come to an end, or want all memory: one line, exit code 2."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import pair
from tests.unit.test_bad_input import check_refused
from tokenize_data import encode, guard, tokenizer_files
from tokenize_data.encode import Encoder
from tokenize_data.errors import RowError, UserError
from tokenize_data.rendered import ASSISTANT, Rendered
from tokenize_data.tokenizer import load_tokenizer


def split_by(expression):
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}}


DOUBLED = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
NO_POST = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "Q", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}
NO_UNKNOWN = {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]], "byte_fallback": False}
# name -> what of tokenizer.json is changed, what of tokenizer_config.json, what is said
FILES = {
    "id of 4e9": (
        {"model": {"vocab": {"zzzz": 4_000_000_000}}},
        {},
        "gives 'zzzz' the id 4,000,000,000, above 16,777,215",
    ),
    "id below 0": ({"model": {"vocab": {"zzzz": -1}}}, {}, "cannot be read (invalid value: integer `-1`"),
    "doubling": (
        {"normalizer": {"type": "Sequence", "normalizers": [DOUBLED] * 40}},
        {},
        "is not a usable tokenizer: it",
    ),
    "panic when used": ({"post_processor": NO_POST}, {}, "PanicException: no entry found for key"),
    "panic when read": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {},
        "PanicException: Precompiled",
    ),
    "expression that goes too deep": (split_by(r"(x+x+)+y"), {}, "line 1: the tokenizer fails on this text (Onig"),
    "no unknown token": (
        {"model": NO_UNKNOWN},
        {},
        "line 1: the tokenizer fails on this text (Encountered an unknown token",
    ),
    "list as BOS": ({}, {"bos_token": ["<s>"]}, "bos_token is ['<s>'], not the text of a token"),
    "number as EOS": ({}, {"eos_token": 5}, "eos_token is 5, not the text of a token"),
    "object as EOS": ({}, {"eos_token": {"content": [1]}}, "eos_token is {'content': [1]}, not the text"),
    "list of added tokens": ({}, {"added_tokens_decoder": [1]}, "added_tokens_decoder is [1], not a list of tokens"),
    "number of extra tokens": ({}, {"extra_special_tokens": 5}, "extra_special_tokens is 5, not a list of tokens"),
    "number as extra token": ({}, {"extra_special_tokens": [5]}, "extra_special_tokens is 5, not the text of a token"),
    "number as template": ({}, {"chat_template": 5}, "chat_template is 5, not text"),
    "unnamed templates": (
        {},
        {"chat_template": [5, {"name": "default", "template": [1]}]},
        "chat_template is [1], not text",
    ),
    "long template": ({}, {"chat_template": "x" * 2_000_000}, "more than 1,048,576 characters"),
}
TEXTS = {
    "tokenizer.json": ("[" * 200_000, "recursion"),
    "tokenizer_config.json": ("[1]", "it is [1], where {...} is needed"),
    "special_tokens_map.json": ("", "no text in it"),
    "chat_template.jinja": (b"\xff", "not UTF-8 text"),
}


@pytest.fixture
def hostile(family, tmp_path):
    def make(changes=None, config=None) -> Path:
        folder = tmp_path / "hostile"
        folder.mkdir()
        source = family("gpt2")
        content = json.loads((source / "tokenizer.json").read_text())
        for key, value in copy.deepcopy(changes or {}).items():
            if key == "model" and "type" not in value:
                content["model"]["vocab"] |= value["vocab"]
            else:
                content[key] = value
        (folder / "tokenizer.json").write_text(json.dumps(content))
        described = json.loads((source / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(described | (config or {})))
        return folder

    return make


@pytest.mark.parametrize("name", FILES)
def test_refused_in_one_line(bench, hostile, tmp_path, name):
    """In a process of its own: what Rust prints on its way out goes past Python's stderr."""
    changes, config, fragment = FILES[name]
    data = bench.jsonl([pair("Is it? " + "x" * 3000)])
    flags = [
        "--data",
        data,
        "--checkpoint",
        hostile(changes, config),
        "--tokenized_data_dir",
        bench.tokenized,
        "--workers",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tokenize_data", "--run_name", "r", *map(str, flags)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": ":".join(sys.path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": ""},
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert fragment in done.stderr
    assert str(tmp_path) in done.stderr
    assert not bench.tokenized.exists() or list(bench.tokenized.iterdir()) == []


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_hold_something_else(bench, hostile, name):
    content, fragment = TEXTS[name]
    folder = hostile()
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    check_refused(
        bench, bench.tokenize("--data", bench.jsonl([pair()]), checkpoint=folder), [f"hostile/{name}", fragment]
    )


def test_a_row_on_which_the_tokenizer_fails_can_be_set_aside(bench, hostile):
    folder = hostile(split_by(r"(x+x+)+y"))
    data = bench.jsonl([pair(), pair("x" * 3000), pair()])
    outcome = bench.tokenize("--data", data, "--max_bad_rows", "1", checkpoint=folder)
    assert outcome.code == 0, outcome.err
    assert "3 rows read = 2 accepted + 1 rejected" in outcome.out
    assert len(bench.documents()) == 2


def test_only_the_failing_document_of_several_is_refused(hostile):
    encoder = Encoder(load_tokenizer(str(hostile(split_by(r"(x+x+)+y")))), fast=False)
    good, bad = (Rendered(text, [0], [ASSISTANT], []) for text in ("Is it?", "x" * 3000))
    results = encoder.encode([good, bad, good])
    assert [isinstance(result, RowError) for result in results] == [False, True, False]
    assert results[0].ids.tolist() == results[2].ids.tolist()


def test_what_went_well_is_not_tried_again(family, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_tokenizer(str(family("gpt2")))
    monkeypatch.setattr(tokenizer_files.guard, "Child", lambda *_: pytest.fail("tried again"))
    load_tokenizer(str(family("gpt2")))
    with pytest.raises(pytest.fail.Exception, match="tried again"):
        load_tokenizer(str(family("llama3")))


def test_what_failed_is_tried_again(hostile, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = hostile({"post_processor": NO_POST})
    for _ in range(2):
        with pytest.raises(UserError, match="not a usable tokenizer"):
            load_tokenizer(str(folder))


def test_a_comparison_that_is_stopped_leaves_the_slow_tokenizer(family, monkeypatch):
    encoder = Encoder(load_tokenizer(str(family("gpt2"))))

    def stopped(self, request):
        raise guard.LimitError("took more than 60 s of processor time")

    monkeypatch.setattr(encode.guard.Child, "ask", stopped)
    assert encoder.prove(["a text"]) == "(the comparison took more than 60 s of processor time)"
    assert not encoder.is_fast
