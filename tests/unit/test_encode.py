"""Ids and roles: what is trained is exactly what the model has to write at generation time, for every family."""

from __future__ import annotations

import json
import unicodedata
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers

from tests.families import CORPUS, FAMILIES
from tokenize_data import fast_bpe, fast_words
from tokenize_data.encode import Encoder, FastPathError
from tokenize_data.rendered import ASSISTANT, TEMPLATE, Rendered
from tokenize_data.templates import choose_template
from tokenize_data.tokenizer import load_tokenizer

PIECES = st.sampled_from(
    [
        "Yes",
        " no",
        "\n",
        "\n\n",
        "  ",
        " ",
        "é",
        "e\u0301",
        "日本",
        "🙂",
        "1234",
        "don't",
        "[INST]",
        "model",
        ".",
        "\t",
        "<",
        "|",
    ]
)
TEXT = st.lists(PIECES, min_size=1, max_size=8).map("".join).filter(lambda text: bool(text.strip()))


@pytest.fixture(scope="session")
def prepared(family, tmp_path_factory):
    """(template, tokenizer, encoder, transformers' tokenizer of the folder that is stored with the shards)."""

    @cache
    def prepare(name):
        from transformers import AutoTokenizer

        template, tokenizer = choose_template(FAMILIES[name][4], load_tokenizer(str(family(name))))
        folder = tmp_path_factory.mktemp(f"stored-{name}")
        tokenizer.save(folder, template.source)
        return template, tokenizer, Encoder(tokenizer), AutoTokenizer.from_pretrained(folder)

    return prepare


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(question=TEXT, answer=TEXT, system=st.none() | TEXT, more=st.none() | st.tuples(TEXT, TEXT))
def test_trained_is_what_the_model_writes_at_generation(prepared, name, question, answer, system, more):
    template, tokenizer, encoder, theirs = prepared(name)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages = ([{"role": "system", "content": system}] if system else []) + messages
    if more:
        messages += [{"role": "user", "content": more[0]}, {"role": "assistant", "content": more[1]}]
    documents = template.documents(messages)
    seen = 0
    for document, encoded in zip(documents, encoder.encode(documents), strict=True):
        shown = messages[
            : next(n for n in range(2, len(messages) + 1) if template.render(messages[:n]) == document.text)
        ]
        assert sum(encoded.run_lengths) == len(encoded.ids)
        at = 0
        first = True
        for length, role in zip(encoded.run_lengths, encoded.run_roles, strict=True):
            if role == ASSISTANT:
                turn = next(
                    i
                    for i in range(len(shown))
                    if shown[i]["role"] == "assistant" and _asks(template, shown, i, document, seen)
                )
                prompt = theirs.apply_chat_template(shown[:turn], add_generation_prompt=True, return_dict=False)
                prompt_text = template.render(shown[:turn], True)
                if first:
                    assert encoded.ids[:at].tolist() == prompt
                written = document.text[len(prompt_text) :]
                ids = encoded.ids[at : at + length].tolist()
                assert ids[-1] in (tokenizer.backend.token_to_id(template.end_of_turn()),)
                text = tokenizer.backend.decode(encoded.ids[: at + length].tolist(), skip_special_tokens=False)
                before = tokenizer.backend.decode(encoded.ids[:at].tolist(), skip_special_tokens=False)
                assert _plain(written).startswith(_plain(text[len(before) :]))
                assert answer.strip() in written or more
                first = False
                seen += 1
            at += length
    assert seen == (2 if more else 1)


def _asks(template, messages, turn, document, seen):
    """Whether the seen-th assistant turn is this one."""
    return [i for i, m in enumerate(messages) if m["role"] == "assistant"].index(turn) == seen


def _plain(text):
    """Without what decoders do to spaces, and composed as some tokenizers do (Qwen)."""
    return "".join(unicodedata.normalize("NFC", text).split())


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(question=TEXT, answer=TEXT)
def test_roles_equal_those_from_the_tokenizers_own_offsets(prepared, name, question, answer):
    """Places from token lengths and places from offsets are two ways to the same runs."""
    template, _, encoder, _ = prepared(name)
    documents = template.documents([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    for document, encoded in zip(documents, encoder.encode(documents), strict=True):
        slow = encoder._by_offsets(document)
        assert encoded.ids.tolist() == slow.ids.tolist()
        assert (encoded.run_lengths, encoded.run_roles) == (slow.run_lengths, slow.run_roles)


@pytest.mark.parametrize("name", ["gpt2", "digits", "llama3", "qwen"])
def test_fast_tokenizer_gives_the_same_ids(family, name):
    tokenizer = load_tokenizer(str(family({"digits": "smollm"}.get(name, name))))
    encode = fast_bpe.build(tokenizer.pipeline)
    assert encode is not None
    rng = np.random.default_rng(0)
    alphabet = [*"ab1 9\n\t.'sé日🙂-", "<|im_start|>", "don't", "  ", "\r\n", "2024"]
    texts = ["".join(rng.choice(alphabet, 30)) for _ in range(400)] + CORPUS
    assert fast_bpe.first_difference(encode, tokenizer.backend, [*texts, *fast_bpe.HARD_TEXTS]) is None


def test_fast_tokenizers_are_not_built_for_other_kinds(family, mistral_v1):
    for name in ("gemma", "llama2", "phi"):
        tokenizer = load_tokenizer(str(family(name)))
        assert fast_bpe.build(tokenizer.pipeline) is None
    for name in ("gpt2", "llama3", "phi"):
        tokenizer = load_tokenizer(str(family(name)))
        assert fast_words.build(tokenizer.pipeline, tokenizer.backend) is None
    assert fast_bpe.build(load_tokenizer(str(mistral_v1)).pipeline) is None


def test_words_are_not_cached_where_a_token_reaches_across_a_space(family):
    """The small vocabularies have such tokens, which SentencePiece's do not."""
    tokenizer = load_tokenizer(str(family("gemma")))
    assert any("\u2581" in token.lstrip("\u2581") for token in tokenizer.pipeline["model"]["vocab"])
    assert fast_words.build(tokenizer.pipeline, tokenizer.backend) is None


@pytest.mark.parametrize("version", ["v1", "v3"])
@pytest.mark.parametrize("prepend", [False, True])
def test_words_from_a_cache_give_the_same_ids(mistral_v1, mistral_v3, version, prepend):
    tokenizer = load_tokenizer(str(mistral_v1 if version == "v1" else mistral_v3))
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    pipeline = dict(tokenizer.pipeline)
    if prepend:  # as Llama 2's tokenizer does
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        pipeline = json.loads(backend.to_str())
    encode = fast_words.build(pipeline, backend)
    assert encode is not None
    rng = np.random.default_rng(0)
    alphabet = [
        *"ab1 9\n\t.'sé日🙂-▁",
        "</s>",
        "[INST]",
        "don't",
        "  ",
        "\r\n",
        "2024",
        " the",
        " patient",
        "](",
        "\n\n",
    ]
    texts = ["".join(rng.choice(alphabet, 30)) for _ in range(500)] + CORPUS + [*fast_bpe.HARD_TEXTS]
    for _ in range(2):  # with an empty cache, then with a full one
        assert fast_bpe.first_difference(encode, backend, texts) is None


def test_fast_tokenizer_that_differs_is_not_used(family, monkeypatch):
    encoder = Encoder(load_tokenizer(str(family("gpt2"))))
    right = encoder._fast
    encoder._fast = lambda text: right(text)[:-1] if "patient" in text else right(text)
    assert encoder.prove(["a text", "the patient"]) == "the patient"
    assert not encoder.is_fast


def test_fast_tokenizer_that_differs_later_is_an_error_for_the_stage_to_start_again(family):
    encoder = Encoder(load_tokenizer(str(family("gpt2"))))
    right = encoder._fast
    encoder._fast = lambda text: right(text)[:-1]
    with pytest.raises(FastPathError):
        encoder.encode([Rendered("the patient", [0], [ASSISTANT], [])])


def test_a_token_that_straddles_two_roles_has_the_first_ones(family):
    encoder = Encoder(load_tokenizer(str(family("gpt2"))))
    (encoded,) = encoder.encode([Rendered("patient", [0, 3], [TEMPLATE, ASSISTANT], [])])
    assert encoded.run_roles[0] == TEMPLATE
    (split,) = encoder.encode([Rendered("patient", [0, 3], [TEMPLATE, ASSISTANT], [3])])
    alone = [encoder._backend.encode(piece, add_special_tokens=False).ids for piece in ("pat", "ient")]
    assert split.ids.tolist() == alone[0] + alone[1]
    assert split.run_lengths == [len(alone[0]), len(alone[1])]


def test_cut_keeps_runs_and_ids_together(family):
    encoder = Encoder(load_tokenizer(str(family("gpt2"))))
    (whole,) = encoder.encode([Rendered("a b c d", [0, 3], [TEMPLATE, ASSISTANT], [])])
    for limit in range(1, len(whole.ids) + 1):
        cut = whole.cut(limit)
        assert len(cut.ids) == sum(cut.run_lengths) == limit


def test_the_real_tokenizers(smollm2, mistral_v1, mistral_v3):
    from transformers import AutoTokenizer

    texts = [*CORPUS, *(text for text in fast_bpe.HARD_TEXTS if text)]
    for folder, choice in ((smollm2, "auto"), (mistral_v1, "mistral"), (mistral_v3, "mistral_v3")):
        template, tokenizer = choose_template(choice, load_tokenizer(str(folder)))
        theirs = AutoTokenizer.from_pretrained(folder)
        encoder = Encoder(tokenizer)
        assert encoder.is_fast
        for question in texts:
            if not question.strip():
                continue
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes, " + question}]
            documents = template.documents(messages)
            (encoded,) = encoder.encode(documents)
            prompt = theirs.apply_chat_template(
                messages[:1], chat_template=template.source, add_generation_prompt=True, return_dict=False
            )
            start = sum(encoded.run_lengths[: encoded.run_roles.index(ASSISTANT)])
            assert encoded.ids[:start].tolist() == prompt
