"""Special tokens that a tokenizer holds only as ordinary entries of its vocabulary, which it never finds in a text."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer

from tokenize_data.encode import Encoder
from tokenize_data.errors import UserError
from tokenize_data.rendered import ASSISTANT
from tokenize_data.templates import choose_template
from tokenize_data.tokenizer import load_tokenizer

MESSAGES = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]


@pytest.fixture
def gemma(family, tmp_path):
    """Gemma's tokenizer with `ordinary` in the vocabulary alone, and `not_special` added, but not as special tokens."""

    def make(ordinary=("<end_of_turn>",), not_special=(), eos="<eos>"):
        source = family("gemma")
        pipeline = json.loads((source / "tokenizer.json").read_text())
        added = [token["content"] for token in pipeline.pop("added_tokens") if token["content"] not in ordinary]
        pipeline["added_tokens"], pipeline["post_processor"] = [], None
        for token in ordinary:
            pipeline["model"]["vocab"][token] = len(pipeline["model"]["vocab"])
        backend = Tokenizer.from_str(json.dumps(pipeline))
        backend.add_tokens([AddedToken(token, special=token not in not_special, normalized=False) for token in added])
        backend.save(str(tmp_path / "tokenizer.json"))
        config = json.loads((source / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": eos}))
        return tmp_path

    return make


def trained_ids(template, tokenizer):
    (encoded,) = Encoder(tokenizer).encode(template.documents(MESSAGES))
    at = [role for length, role in zip(encoded.run_lengths, encoded.run_roles, strict=True) for _ in range(length)]
    return [int(number) for number, role in zip(encoded.ids, at, strict=True) if role == ASSISTANT]


def test_an_end_of_turn_in_the_vocabulary_alone_is_refused(gemma):
    with pytest.raises(UserError) as error:
        choose_template("gemma", load_tokenizer(str(gemma())))
    assert str(error.value) == (
        "template 'gemma' needs special tokens that the tokenizer takes apart, though its vocabulary has them: "
        "<end_of_turn>; "
        'list them as add_tokens = ["<end_of_turn>"] in the model\'s entry of checkpoints.toml, or use another '
        "--template"
    )


def test_add_tokens_makes_it_whole_without_a_new_row(gemma):
    base = load_tokenizer(str(gemma()))
    wanted = base.extended(("<end_of_turn>", "<|new|>"))
    assert wanted.added == ("<|new|>",)
    assert wanted.vocabulary_size == base.vocabulary_size + 1
    end = base.backend.token_to_id("<end_of_turn>")
    assert wanted.backend.token_to_id("<end_of_turn>") == end
    assert wanted.fingerprint != base.fingerprint
    assert trained_ids(*choose_template("gemma", wanted))[-1] == end


def test_the_packaged_megatron_template_makes_its_tokens_whole(gemma):
    base = load_tokenizer(str(gemma(ordinary=("<|im_end|>",))))
    template, tokenizer = choose_template("megatron", base)
    assert tokenizer.added == ("<|im_start|>",)
    assert trained_ids(template, tokenizer)[-1] == base.backend.token_to_id("<|im_end|>")


def test_an_end_of_turn_that_is_added_but_not_special_is_trained(gemma):
    tokenizer = load_tokenizer(str(gemma(ordinary=(), not_special=("<end_of_turn>", "<start_of_turn>"))))
    template, tokenizer = choose_template("gemma", tokenizer)
    assert template.end_of_turn() == "<end_of_turn>"
    assert trained_ids(template, tokenizer)[-1] == tokenizer.backend.token_to_id("<end_of_turn>")


def test_an_end_of_sequence_in_the_vocabulary_alone_is_whole_as_in_transformers(gemma, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = gemma(eos="<end_of_turn>")
    template, tokenizer = choose_template("gemma", load_tokenizer(str(folder)))
    theirs = AutoTokenizer.from_pretrained(folder)
    text = template.render(MESSAGES)
    assert (
        tokenizer.backend.encode(text, add_special_tokens=False).ids == theirs(text, add_special_tokens=False).input_ids
    )
    assert trained_ids(template, tokenizer)[-1] == theirs.eos_token_id
