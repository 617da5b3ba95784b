"""Golden masks of every row format: what the model reads, and in «» what is trained."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer

from tests.real_parts import trl_templates
from tests.unit.test_public_templates import CALL, RESULT, TOOLS

ASK, SAY = {"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}
MORE, LAST = {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "No."}
DEFAULT = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
TURN = "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n"
AGAIN = "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
CALLED = '<tool_call>\n{"name": "dose", "arguments": {"drug": "aspirin"}}\n</tool_call><|im_end|>'
RETURNED = "<|im_start|>user\n<tool_response>\n100 mg\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


def masks(bench, rows, *flags):
    """Each document as text, with what is trained in «»."""
    outcome = bench.tokenize("--data", bench.jsonl(rows), "--retokenize", *flags)
    assert outcome.code == 0, outcome.err
    folder = bench.tokenized / "r"
    tokenizer = Tokenizer.from_file(str(folder / bench.manifest()["tokenizer"]["folder"] / "tokenizer.json"))
    found = []
    for document in bench.documents():
        text, run, was = "", [], 0
        for token, learn in zip([*document["ids"], None], [*document["trained"], None], strict=True):
            if run and learn != was:
                piece = tokenizer.decode(run, skip_special_tokens=False)
                text, run = text + (f"«{piece}»" if was else piece), []
            run, was = [*run, token], learn
        found.append(text)
    return found


GOLDEN = {
    "qa": ({"prompt": "Is it?", "gold": "Yes."}, DEFAULT + TURN + "«Yes.<|im_end|>»\n"),
    "chat": ({"messages": [ASK, SAY]}, DEFAULT + TURN + "«Yes.<|im_end|>»\n"),
    "chat, weight 0": (
        {"messages": [ASK, {**SAY, "weight": 0}, MORE, LAST]},
        DEFAULT + TURN + "Yes.<|im_end|>\n" + AGAIN + "«No.<|im_end|>»\n",
    ),
    "chat, parts of text": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Is it?"}]}, SAY]},
        DEFAULT + TURN + "«Yes.<|im_end|>»\n",
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "Yes."}]},
        DEFAULT + TURN + "«Yes.<|im_end|>»\n",
    ),
    "sharegpt, system": (
        {
            "system": "Be brief.",
            "conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "Yes."}],
        },
        "<|im_start|>system\nBe brief.<|im_end|>\n" + TURN + "«Yes.<|im_end|>»\n",
    ),
    "alpaca": ({"instruction": "Is it?", "input": "", "output": "Yes."}, DEFAULT + TURN + "«Yes.<|im_end|>»\n"),
    "prompt_completion": ({"prompt": "Is it? It", "completion": " is."}, "Is it? It« is.<|im_end|>»"),
    "prompt_completion, with EOS": ({"prompt": "Is it?", "completion": " So.<|im_end|>"}, "Is it?« So.<|im_end|>»"),
    "prompt_completion, messages": (
        {"prompt": [ASK, SAY, MORE], "completion": [LAST]},
        DEFAULT + TURN + "Yes.<|im_end|>\n" + AGAIN + "«No.<|im_end|>»\n",
    ),
    "input_output": (
        {
            "segments": [
                {"label": False, "text": "Q: Is it?\nA:"},
                {"label": True, "text": " Yes.\n"},
                {"label": False, "text": "Q: Sure?\nA:"},
                {"label": True, "text": " No.<|im_end|>"},
            ]
        },
        "Q: Is it?\nA:« Yes.\n»Q: Sure?\nA:« No.<|im_end|>»",
    ),
    "text": ({"text": "Once upon a time."}, "Once« upon a time.<|im_end|>»"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_mask(bench, name):
    row, mask = GOLDEN[name]
    assert masks(bench, [row]) == [mask]
    assert masks(bench, [row], "--format", name.partition(",")[0]) == [mask]


FOR_TOOLS = {
    "openai": {"messages": [ASK, CALL, RESULT, SAY], "tools": TOOLS},
    "openai, arguments as text": {
        "messages": [
            ASK,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "a1", "type": "function", "function": {"name": "dose", "arguments": '{"drug": "aspirin"}'}}
                ],
            },
            RESULT,
            SAY,
        ],
        "tools": TOOLS,
        "parallel_tool_calls": False,
    },
    "functions of before": {
        "messages": [
            ASK,
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "dose", "arguments": '{"drug": "aspirin"}'},
            },
            {"role": "function", "name": "dose", "content": "100 mg"},
            SAY,
        ],
        "functions": [TOOLS[0]["function"]],
    },
    "sharegpt, tools as text": {
        "conversations": [
            {"from": "human", "value": "Is it?"},
            {"from": "function_call", "value": '{"name": "dose", "arguments": {"drug": "aspirin"}}'},
            {"from": "observation", "value": "100 mg"},
            {"from": "gpt", "value": "Yes."},
        ],
        "tools": json.dumps(TOOLS),
    },
}


@pytest.mark.parametrize("name", FOR_TOOLS)
def test_calls_are_trained_and_results_are_not(bench, name):
    template = trl_templates() / "qwen2_5.jinja"
    (mask,) = masks(bench, [FOR_TOOLS[name]], "--template", template)
    assert mask.endswith(TURN + f"«{CALLED}»\n" + RETURNED + "«Yes.<|im_end|>»\n")
    assert '"description": "The usual dose."' in mask


def test_a_template_without_tools_is_refused(bench):
    outcome = bench.tokenize("--data", bench.jsonl([FOR_TOOLS["openai"]]))
    assert outcome.code == 2
    assert (
        "line 1: template 'the tokenizer's own' shows the model no tools ('dose'): choose a --template" in outcome.err
    )


def test_thoughts_are_trained_where_a_row_has_them(bench):
    template = trl_templates() / "qwen3.jinja"
    rows = [
        {"messages": [ASK, {**SAY, "reasoning_content": "So it seems."}]},
        {"messages": [ASK, {"role": "assistant", "content": "<think>\nSo it seems.\n</think>\n\nYes."}]},
        {"messages": [ASK, SAY]},
    ]
    trained = "«<think>\nSo it seems.\n</think>\n\nYes.<|im_end|>»\n"
    assert masks(bench, rows, "--template", template) == [
        TURN + trained,
        TURN + trained,
        TURN + "<think>\n\n</think>\n\n«Yes.<|im_end|>»\n",
    ]


def test_switches_of_a_template(bench):
    """They are part of the template that the shards keep, and the model is exported with."""
    template = trl_templates() / "qwen3.jinja"
    switch = ("--chat_template_kwargs", '{"enable_thinking": false}')
    assert masks(bench, [{"messages": [ASK, SAY]}], "--template", template, *switch) == [
        TURN + "<think>\n\n</think>\n\n«Yes.<|im_end|>»\n"
    ]
    kept = bench.tokenized / "r" / bench.manifest()["tokenizer"]["folder"] / "chat_template.jinja"
    assert kept.read_text().startswith("{%- if enable_thinking is not defined %}{% set enable_thinking = false %}")
    outcome = bench.tokenize("--data", bench.jsonl([{"messages": [ASK, SAY]}]), "--template", template)
    assert outcome.code == 2
    assert "was made with another template" in outcome.err
    outcome = bench.tokenize("--data", bench.jsonl([{"messages": [ASK, SAY]}]), *switch, run_name="other")
    assert "--chat_template_kwargs enable_thinking: template 'the tokenizer's own' has no such variable" in outcome.err


def test_chosen_turns(bench):
    anna, bert = {**SAY, "name": "anna"}, {**LAST, "name": "bert"}
    row = {"messages": [ASK, anna, MORE, bert]}
    first, second = "Yes.<|im_end|>", "No.<|im_end|>"
    for flags, marked in (
        ((), (f"«{first}»", f"«{second}»")),
        (("--train_on", "last"), (first, f"«{second}»")),
        (("--train_on", "anna, carl"), (f"«{first}»", second)),
    ):
        assert masks(bench, [row], *flags) == [DEFAULT + TURN + f"{marked[0]}\n" + AGAIN + f"{marked[1]}\n"]
    outcome = bench.tokenize("--data", bench.jsonl([row]), "--train_on", "carl", run_name="other")
    assert outcome.code == 2
    assert "no assistant message has a name of --train_on carl, but 'anna, bert': name one" in outcome.err


def test_weights_of_rows(bench):
    rows = [
        {"prompt": f"{number}?", "gold": "Yes.", "w": weight} for number, weight in enumerate([0, 1, 2.0] + [0.5] * 40)
    ]
    found = masks(bench, rows, "--weight_key", "w")
    counts = [sum(f"user\n{number}?" in text for text in found) for number in range(len(rows))]
    assert counts[:3] == [0, 1, 2]
    assert set(counts[3:]) == {0, 1}
    assert 8 <= sum(counts[3:]) <= 32
    assert masks(bench, rows, "--weight_key", "w") == found
    outcome = bench.tokenize("--data", bench.jsonl([{**rows[0], "w": "much"}]), "--weight_key", "w", run_name="other")
    assert outcome.code == 2
    assert (
        "line 1: 'w' is 'much', not a weight: write a number from 0 to 1000, or leave out --weight_key" in outcome.err
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": [SAY]}, "'prompt' is text and 'completion' a list: make both texts, or both"),
        ({"prompt": [ASK], "completion": [MORE]}, "'completion' has no assistant message, so nothing to learn"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"segments": "x"}, "'segments' is text, not a list of objects with 'label' and 'text'"),
        ({"segments": [{"label": 1, "text": "x"}]}, "'segments' entry 1 has label 1: write true (trained) or false"),
        ({"segments": [{"text": "x", "label": False}]}, "no segment has label true and a text, so nothing to learn"),
        ({"segments": [7]}, "'segments' entry 1 is 7, not an object with 'label' and 'text'"),
        ({"messages": []}, "'messages' is an empty list: add messages, or leave the row out"),
        ({"messages": [ASK, SAY], "tools": "{"}, "'tools' is '{', not JSON"),
        ({"messages": [ASK, SAY], "tools": [1]}, "'tools' is [1], not a list of objects, each with the description"),
        (
            {"messages": [ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}]},
            "message 2: arguments of 'f' is 'x', not JSON",
        ),
        (
            {"messages": [ASK, {**SAY, "reasoning_content": 5}]},
            "message 2: 'reasoning_content' is a number (5), not text",
        ),
        ({"messages": [ASK, {**SAY, "reasoning_content": "x"}]}, "has thoughts (reasoning_content), which template"),
    ],
)
def test_rows_that_cannot_be_used(bench, row, message):
    outcome = bench.tokenize("--data", bench.jsonl([row]))
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert "data.jsonl line 1" in outcome.err
    assert message in outcome.err
