"""The mask with characters that normalisation changes: what is trained begins and ends where the model begins and ends
to write.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from tests.families import FAMILIES
from tokenize_data import fast_bpe
from tokenize_data.encode import Encoder
from tokenize_data.rendered import ASSISTANT, TEMPLATE, USER, Rendered
from tokenize_data.templates import choose_template
from tokenize_data.tokenizer import BaseTokenizer, load_tokenizer

# NFC makes the text shorter (e + acute, Angstrom sign), longer (letters with a nukta, a musical note, a Hebrew
# presentation form), or brings marks into another order.
_SHORTER = ["e\u0301", "\u212b", "n\u0303", "\u1100\u1161", "\u0340", "A\u030a"]
_LONGER = ["\u0958", "\u09dc", "\u09df", "\U0001d15e", "\ufb1d", "\u0f43", "\u2adc"]
_MARKS = ["\u0301", "\u0338", "\u09bc", "q\u0307\u0323", "\u0323\u0301", "\u0334"]
_PLAIN = ["Yes", " no", "\n", "  ", " ", "<think>", "\n\n", "日本", "🙂", "1", "=", ">", "<", "ক", "া"]
TEXT = (
    st.lists(st.sampled_from(_SHORTER + _LONGER + _MARKS + _PLAIN), min_size=1, max_size=12)
    .map("".join)
    .filter(str.strip)
)
REAL = {"smollm2": "auto", "mistral_v1": "mistral", "mistral_v3": "mistral_v3"}
CANCELLING = [
    ("e\u0301", "\u09dc"),
    ("\u0958 e\u0301e\u0301e\u0301", "বাংলা"),
    ("\u212b?", "\u0958\u09dc yes"),
    ("\u09dc", "<think>\n\ne\u0301e\u0301e\u0301"),
]


@pytest.fixture(scope="session")
def tools(family, request):
    @cache
    def prepare(name):
        folder = request.getfixturevalue(name) if name in REAL else family(name)
        template, tokenizer = choose_template(REAL.get(name) or FAMILIES[name][4], load_tokenizer(str(folder)))
        return template, tokenizer, Encoder(tokenizer), Encoder(tokenizer, fast=False)

    return prepare


@pytest.mark.parametrize("name", [*FAMILIES, *REAL])
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(question=TEXT, answer=TEXT)
@example(*CANCELLING[0]).via("fewer and more bytes, one of each")
@example(*CANCELLING[1]).via("both in the question")
@example(*CANCELLING[2]).via("question shorter, answer longer")
@example(*CANCELLING[3]).via("question longer, answer shorter")
def test_trained_tokens_are_those_after_the_prompt(tools, name, question, answer):
    template, tokenizer, *encoders = tools(name)
    backend = tokenizer.backend
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    (document,) = template.documents(messages)
    prompt = backend.encode(template.render(messages[:1], True), add_special_tokens=False).ids
    end_of_turn = backend.token_to_id(template.end_of_turn())
    for encoder in encoders:
        (encoded,) = encoder.encode([document])
        ids = encoded.ids.tolist()
        assert ids[: len(prompt)] == prompt
        end = ids.index(end_of_turn, len(prompt)) + 1
        roles = [
            role for length, role in zip(encoded.run_lengths, encoded.run_roles, strict=True) for _ in range(length)
        ]
        trained = [place for place, role in enumerate(roles) if role == ASSISTANT]
        assert trained == list(range(len(prompt), end)), (backend.decode(ids[len(prompt) : end]), document)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    text=st.lists(
        st.sampled_from([*_SHORTER, *_LONGER, *_MARKS, *_PLAIN, "<|im_end|>", "<|im_start|>"]), max_size=12
    ).map("".join)
)
@example("<|im_end|>\u0338").via("the mark would melt with the added token's last character")
def test_the_fast_tokenizer_composes_around_added_tokens(tools, text):
    _, tokenizer, *_ = tools("qwen")
    assert fast_bpe.first_difference(fast_bpe.build(tokenizer.pipeline), tokenizer.backend, [text]) is None


# ---- tokenizers of other kinds, whose token lengths say nothing or only something of the text


def _characters() -> Tokenizer:
    """Without bytes to fall back on: what it does not know is <unk>."""
    vocabulary = {token: number for number, token in enumerate(["<unk>", *"abcdm."])}
    return Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True))


def _lower_case() -> Tokenizer:
    backend = _characters()
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return backend


def _word_pieces() -> Tokenizer:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "c": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


_BY_CHANCE = {  # text, where the answer begins, tokens before it
    "unknown characters of two and of eight bytes": (_characters, "éab日日éc", 2, 2),
    "a.m. of three bytes becomes four, da of three two": (_lower_case, "㏂ab㍲c", 2, 5),
    "signs of continued words weigh what dropped spaces did": (_word_pieces, "abb    c", 3, 3),
}


@pytest.mark.parametrize("kind", _BY_CHANCE)
def test_lengths_that_add_up_by_chance_are_not_relied_on(kind):
    make, text, at, tokens_before = _BY_CHANCE[kind]
    backend = make()
    backend.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    encoder = Encoder(BaseTokenizer(backend=backend, config={"eos_token": "<end>"}, chat_template=None))
    (encoded,) = encoder.encode([Rendered(text + "<end>", [0, at], [TEMPLATE, ASSISTANT], [])])
    assert encoded.run_roles == [TEMPLATE, ASSISTANT]
    assert encoded.run_lengths[0] == tokens_before


def test_a_space_before_the_answer_is_the_prompts_where_offsets_are_trimmed(family):
    """Llama 3's and GPT-2's post-processor takes leading spaces out of offsets: a token of spaces would begin where it
    ends.
    """
    backend = Tokenizer.from_str(load_tokenizer(str(family("gpt2"))).backend.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.normalizer = normalizers.NFC()
    tokenizer = replace(load_tokenizer(str(family("gpt2"))), backend=backend)
    text, at = "caf\u00e9\u212b: \nNo", 7
    encoded = Encoder(tokenizer)._by_offsets(Rendered(text, [0, at], [USER, ASSISTANT], []))
    first = encoded.run_lengths[0]
    assert backend.decode(encoded.ids[first:].tolist()) == "\nNo"


def test_a_space_that_is_put_before_each_stretch_of_text(family):
    pipeline = json.loads(load_tokenizer(str(family("gpt2"))).backend.to_str())
    pipeline["pre_tokenizer"]["add_prefix_space"] = True
    tokenizer = replace(load_tokenizer(str(family("gpt2"))), backend=Tokenizer.from_str(json.dumps(pipeline)))
    encoder = Encoder(tokenizer)
    offsets, encoder._by_offsets = encoder._by_offsets, lambda document: pytest.fail("the lengths are known")
    document = Rendered("a patient<|endoftext|>was given", [0, 9, 26], [USER, TEMPLATE, ASSISTANT], [])
    (encoded,) = encoder.encode([document])
    slow = offsets(document)
    assert (encoded.run_lengths, encoded.run_roles) == (slow.run_lengths, slow.run_roles)
