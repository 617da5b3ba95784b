"""Documents longer than --seq: cut at the right, with a shorter question, or refused."""

from __future__ import annotations

import json
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sft.config.settings import Settings
from tests.conftest import pair
from tests.unit.test_masks import DEFAULT, TURN, masks
from tokenize_data.dataset import DatasetSpec
from tokenize_data.flags import flags_of
from tokenize_data.recipe import dataset_values, parse_dataset
from tokenize_data.truncate import limited

WORDS = " ".join(f"word{number}" for number in range(400))
QUESTION = ("--truncate", "question", "--seq")
ROOM = 120


def turns(*texts, first="user"):
    roles = ("user", "assistant") if first == "user" else ("system", "user", "assistant")
    return {"messages": [{"role": roles[at % len(roles)], "content": text} for at, text in enumerate(texts)]}


def one_document(bench, row, *flags, checkpoint=None, run_name="r"):
    data = bench.jsonl([row])
    outcome = bench.tokenize("--data", data, "--retokenize", *flags, run_name=run_name, checkpoint=checkpoint)
    assert outcome.code == 0, outcome.err
    (document,) = bench.documents(run_name)
    return document, outcome


def expected(theirs, source, messages):
    """(ids, trained) by transformers: trained is what follows each generation prompt, up to the end of the turn."""
    ids = theirs.apply_chat_template(messages, chat_template=source, return_dict=False)
    trained = [0] * len(ids)
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = theirs.apply_chat_template(
            messages[:at], chat_template=source, add_generation_prompt=True, return_dict=False
        )
        whole = theirs.apply_chat_template(messages[: at + 1], chat_template=source, return_dict=False)
        assert ids[: len(prompt)] == prompt
        stops = {theirs.convert_tokens_to_ids(name) for name in ("<|im_end|>", "</s>")}
        last = max(place for place, token in enumerate(whole) if token in stops)
        trained[len(prompt) : last + 1] = [1] * (last + 1 - len(prompt))
    return ids, trained


CONVERSATIONS = {
    "one turn": turns(WORDS, "It is so, they say."),
    "system message": turns("Answer in one word.", WORDS, "Yes.", first="system"),
    "long system message": turns(WORDS, "Is it?", "Yes.", first="system"),
    "three turns": turns("Is it?", "Yes, it is.", WORDS, "No.", "Sure?", "Quite sure."),
    "not only ASCII": turns("日本語のテキスト 🙂 é " * 60, "はい。"),
}


@pytest.mark.parametrize("side", ["end", "start"])
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("kind", ["BPE", "SentencePiece"])
def test_the_document_is_that_of_transformers_with_the_shortened_question(bench, mistral_v1, kind, name, side):
    """The shortened text is found in the document's own text; everything else follows from it."""
    row = CONVERSATIONS[name]
    folder, template = (bench.base, "auto") if kind == "BPE" else (mistral_v1, "mistral")
    flags = (*QUESTION, ROOM, "--truncate_side", side, "--template", template)
    document, outcome = one_document(bench, row, *flags, checkpoint=folder)
    stored = bench.tokenized / "r" / bench.manifest()["tokenizer"]["folder"]
    theirs, source = AutoTokenizer.from_pretrained(stored), (stored / "chat_template.jinja").read_text()

    longest = max(row["messages"], key=lambda message: len(message["content"]))
    texts = dict.fromkeys(limited(longest["content"], count, side) for count in range(1, len(longest["content"])))
    candidates = [
        [message | {"content": text} if message is longest else message for message in row["messages"]]
        for text in texts
    ]
    ids_of = partial(theirs.apply_chat_template, chat_template=source, return_dict=False)
    number = next(at for at, messages in enumerate(candidates) if ids_of(messages) == document["ids"])
    assert (document["ids"], document["trained"]) == expected(theirs, source, candidates[number])
    assert len(document["ids"]) <= ROOM < len(ids_of(candidates[number + 1])), "no more is left out than has to be"
    whole, _ = expected(theirs, source, row["messages"])
    assert document["cut"] == len(whole) - len(document["ids"])
    assert bench.manifest()["num_shortened"] == 1
    assert bench.manifest()["num_cut"] == 0
    assert (
        f"1 documents with a shortened question, so that they fit into {ROOM} tokens with their answers" in outcome.out
    )
    assert "were cut" not in outcome.err


LONG = "one two three four five six seven eight nine ten eleven twelve"
GOLDEN = {
    "end": (
        {"prompt": LONG, "gold": "Yes."},
        (*QUESTION, 40),
        DEFAULT + "<|im_start|>user\none two three four five six<|im_end|>\n<|im_start|>assistant\n«Yes.<|im_end|>»\n",
    ),
    "start": (
        {"prompt": LONG, "gold": "Yes."},
        (*QUESTION, 40, "--truncate_side", "start"),
        DEFAULT
        + "<|im_start|>user\nseven eight nine ten eleven twelve<|im_end|>\n<|im_start|>assistant\n«Yes.<|im_end|>»\n",
    ),
    "it fits": ({"prompt": LONG, "gold": "Yes."}, (*QUESTION, 60), None),
    "right": (
        {"prompt": "Is it?", "gold": LONG},
        ("--seq", 40),
        DEFAULT + TURN + "«one two three four five six seven»",
    ),
    "earlier answers": (
        turns("Is it?", LONG, LONG + " thirteen fourteen", "Yes."),
        (*QUESTION, 62),
        DEFAULT + TURN + f"«{LONG}<|im_end|>»\n<|im_start|>user\none two<|im_end|>\n<|im_start|>assistant\n"
        "«Yes.<|im_end|>»\n",
    ),
    "prompt_completion": (
        {"prompt": LONG, "completion": " Yes, it is."},
        (*QUESTION, 10),
        "one two three four« Yes, it is.<|im_end|>»",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_mask(bench, name):
    row, flags, mask = GOLDEN[name]
    (whole,) = masks(bench, [row])
    assert masks(bench, [row], *flags) == [mask or whole]


def test_each_of_several_documents_of_a_row_is_shortened_alone(bench):
    """A template that shows earlier answers otherwise makes a document of each turn."""
    template = bench.write(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' and not loop.last %}"
        "(past) {% endif %}{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        "past.jinja",
    )
    row = turns(LONG, "Yes.", LONG + " thirteen", "No.")
    first, second = masks(bench, [row], "--template", template, *QUESTION, 40)
    assert first == f"<|im_start|>user\n{LONG}<|im_end|>\n<|im_start|>assistant\n«Yes.<|im_end|>»\n"
    questions = [part.split("<|im_end|>")[0] for part in second.split("<|im_start|>user\n")[1:]]
    assert [LONG.startswith(question) for question in questions] == [True, True]
    assert abs(len(questions[0]) - len(questions[1])) <= 9, "they are equally long, so both are shortened"
    assert second.endswith("<|im_start|>assistant\n«No.<|im_end|>»\n")
    assert [document["cut"] > 0 for document in bench.documents()] == [False, True]


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        ({"prompt": LONG, "gold": WORDS}, (*QUESTION, 60), "tokens, and without the question still "),
        ({"prompt": LONG, "gold": WORDS}, (*QUESTION, 60), "more than --seq 60 (--truncate question): raise --seq, or"),
        (
            {"text": WORDS},
            (*QUESTION, 60),
            "tokens, more than --seq 60, and there is no question to shorten (--truncate question): raise --seq, "
            "or use --truncate right for this data set",
        ),
        ({"prompt": " " * 500, "completion": WORDS}, (*QUESTION, 60), "and without the question still "),
        ({"segments": [{"label": True, "text": WORDS}]}, (*QUESTION, 60), "there is no question to shorten"),
        (
            {"prompt": "Is it?", "gold": WORDS},
            ("--truncate", "refuse", "--seq", "60"),
            "tokens, more than --seq 60 (--truncate refuse): raise --seq, shorten the row, or use --truncate question",
        ),
        (
            {"prompt": WORDS, "gold": "Yes."},
            ("--seq", "60"),
            "(the answer begins later): raise --seq, or shorten the question (--truncate question)",
        ),
    ],
)
def test_what_cannot_be_made_to_fit_is_a_bad_row(bench, row, flags, message):
    good = {"prompt": "Is it?", "gold": "Yes."} if "prompt" in row else {**row, **dict.fromkeys(row, "Short.")}
    good = {"prompt": "Is it?", "completion": "Yes."} if "completion" in row else good
    good = {"segments": [{"label": True, "text": "Short."}]} if "segments" in row else good
    data = bench.jsonl([good, row])
    outcome = bench.tokenize("--data", data, *flags)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert "data.jsonl line 2: " in outcome.err
    assert message in outcome.err
    outcome = bench.tokenize("--data", data, *flags, "--max_bad_rows", "1")
    assert outcome.code == 0, outcome.err
    assert "2 rows read = 1 accepted + 1 rejected" in outcome.out
    (rejected,) = map(json.loads, (bench.tokenized / "r" / "rejected.jsonl").read_text().splitlines())
    assert message in rejected["reason"]


def test_existing_shards_are_compared(bench):
    data = bench.jsonl([pair(LONG)])
    assert bench.tokenize("--data", data, "--seq", "40", "--truncate", "question").code == 0
    again = bench.tokenize("--data", data, "--seq", "40", "--truncate", "question")
    assert (again.code, again.err) == (0, "")
    other = bench.tokenize("--data", data, "--seq", "40", "--truncate", "question", "--truncate_side", "start")
    assert "truncate_side: made with 'end', asked for 'start'" in other.err
    other = bench.tokenize("--data", data, "--seq", "40")
    assert "truncate: made with 'question', asked for 'right'" in other.err
    file = bench.tokenized / "r" / "manifest.json"
    made = json.loads(file.read_text())
    del made["num_shortened"], made["datasets"][0]["reading"]["truncate"]  # as made by an earlier version
    del made["datasets"][0]["reading"]["truncate_side"]
    file.write_text(json.dumps(made))
    assert bench.tokenize("--data", data, "--seq", "40").err == ""


def test_data_sets_of_a_recipe_differ(bench):
    first, second = bench.jsonl([pair(LONG)], "a.jsonl"), bench.jsonl([pair("Is it?", LONG)], "b.jsonl")
    recipe = (
        f"truncate: question\nseq: 40\ndatasets:\n  - files: [{first}]\n  - {{files: [{second}], truncate: right}}\n"
    )
    outcome = bench.tokenize("--config", bench.write(recipe, "mix.yaml"))
    assert outcome.code == 0, outcome.err
    shortened, cut = bench.documents()
    assert shortened["cut"] > 0 < cut["cut"]
    manifest = bench.manifest()
    assert (manifest["num_shortened"], manifest["num_cut"]) == (1, 1)
    assert [made["reading"]["truncate"] for made in manifest["datasets"]] == ["question", "right"]
    shown = bench.inspect().out
    assert f"{shortened['cut']} tokens cut from the question" in shown
    assert f"{cut['cut']} tokens cut " in shown
    assert "2, 1 cut at 40 tokens" in shown
    assert "1 documents with a shortened question" in shown
    assert "1 of 2 documents (50.0%) are cut at --seq 40" in shown, "a shortened question is no lost answer"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--truncate", "left"], "--truncate left: use one of right, question, refuse"),
        (["--truncate_side", "middle"], "--truncate_side middle: use one of end, start"),
        (["--truncate_side", "start"], "--truncate_side start is for --truncate question, not --truncate right: add"),
    ],
)
def test_wrong_values(bench, flags, message):
    outcome = bench.tokenize("--data", bench.jsonl([pair()]), *flags)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert message in outcome.err


def test_a_wrong_value_of_a_data_set(bench):
    recipe = bench.write(f"datasets:\n  - {{files: [{bench.jsonl([pair()])}], truncate: left}}\n", "r.yaml")
    assert "truncate left: use one of right, question, refuse" in bench.tokenize("--config", recipe).err


def test_the_data_stage_of_a_run_is_told(bench):
    """`sft` starts it with these flags, and with its data sets as a recipe."""
    spec = DatasetSpec(files=("a",), name="a", truncate="question", truncate_side="start", answer_key="a.b[0]")
    found = Settings.of(run_name="r", datasets=(spec,), truncate="question", truncate_side="start")
    assert flags_of(found.data)[2:] == ["--truncate", "question", "--truncate_side", "start"]
    assert parse_dataset(dataset_values(spec), "datasets[0]", 0) == spec


@pytest.mark.parametrize(
    ("text", "limit", "side", "kept"),
    [
        ("one two", 7, "end", "one two"),
        ("one two", 4, "end", "one"),
        ("one two", 4, "start", "two"),
        ("   x", 1, "end", "   x"),
        ("     ", 2, "start", "     "),
        ("one two three", 9, "end", "one two"),
        ("one two three", 11, "start", "two three"),
        ("one " + "x" * 60, 40, "end", "one " + "x" * 36),
        ("\n\n one", 1, "end", "\n\n o"),
        ("one \n", 1, "start", "e \n"),
    ],
)
def test_a_text_is_cut_at_a_side_and_never_blank(text, limit, side, kept):
    assert limited(text, limit, side) == kept


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(alphabet="ab .\n\u0301🙂", min_size=1, max_size=60), side=st.sampled_from(["end", "start"]))
def test_what_is_kept_is_one_side_of_the_text_and_grows_with_the_limit(text, side):
    found = [limited(text, limit, side) for limit in range(1, len(text) + 1)]
    assert found[-1] == text
    assert all(text.startswith(kept) if side == "end" else text.endswith(kept) for kept in found)
    assert all(kept.strip() or not text.strip() for kept in found)
    assert [len(kept) for kept in found] == sorted(len(kept) for kept in found)
