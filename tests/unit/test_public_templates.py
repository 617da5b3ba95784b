"""The chat templates of public models, against transformers' own rendering and TRL's marks of what an assistant writes.

A template is either trained with exactly what the model writes after its generation prompt, or refused by name.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tests.real_parts import trl_templates
from tokenize_data.chat import ChatTemplate
from tokenize_data.errors import RowError, UserError
from tokenize_data.rendered import ASSISTANT
from tokenize_data.templates import template_values

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Is it?"}
ANSWER = {"role": "assistant", "content": "Yes."}
MORE = {"role": "user", "content": "Sure?"}
LAST = {"role": "assistant", "content": "No 1."}
THOUGHT = {**LAST, "reasoning_content": "I think so.", "thinking": "I think so."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "dose",
            "description": "The usual dose.",
            "parameters": {
                "type": "object",
                "properties": {"drug": {"type": "string", "description": "its name"}},
                "required": ["drug"],
            },
        },
    }
]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "a1", "function": {"name": "dose", "arguments": {"drug": "aspirin"}}}],
}
RESULT = {"role": "tool", "content": "100 mg", "name": "dose", "tool_call_id": "a1"}
CASES: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "one turn": ([USER, ANSWER], None),
    "two turns": ([SYSTEM, USER, ANSWER, MORE, LAST], None),
    "thoughts": ([USER, THOUGHT], None),
    "tools": ([USER, CALL, RESULT, LAST], TOOLS),
}
FOLDER = trl_templates()
NAMES = sorted(file.stem for file in FOLDER.glob("*.jinja"))
ORIGINALS = [name for name in NAMES if not name.endswith("_training")]
MARKED = [name for name in ORIGINALS if f"{name}_training" in NAMES]
# With pictures: contents are lists of parts there.
NO_TEXT = {"idefics3", "llava_next", "smolvlm"}
# What a conversation cannot be trained with, and why: templates say so, or would leave out what the row contains.
ONE_TURN_ONLY = {"gemma"}  # no system message
NO_TOOLS = {
    "cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3", "lfm2", "llama3", "phi3", "phi3_5",
    "qwen2_5_vl",
}  # fmt: skip
NO_THOUGHTS = {
    "cohere", "cohere2", "gemma", "gemma3", "gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "lfm2", "lfm2_v2",
    "llama3", "llama3_1", "llama3_2", "phi3", "phi3_5", "qwen2_5", "qwen2_5_vl", "qwen3_5_nothink",
    "qwen3_instruct_2507", "qwen3_vl",
}  # fmt: skip
REFUSED = {"two turns": ONE_TURN_ONLY, "thoughts": NO_THOUGHTS, "tools": NO_TOOLS}
_SPECIAL = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜<>]+｜>|<start_of_turn>|<end_of_turn>|<\|turn>|<turn\|>|\[gMASK\]")
_EMPTY = re.compile(r"\s*(<think>)?\s*</think>\s*")


def special_tokens(name: str) -> dict[str, str]:
    if "deepseek" in name:
        return {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    if "qwen" in name:
        return {"eos_token": "<|im_end|>"}
    return {"bos_token": "<bos>" if "gemma" in name else "<s>", "eos_token": "</s>"}


def template_of(name: str, source: str | None = None) -> ChatTemplate:
    source = source or (FOLDER / f"{name}.jinja").read_text()
    tokens = special_tokens(name)
    texts = frozenset(_SPECIAL.findall(source)) | set(tokens.values())
    template = ChatTemplate(name=name, source=source, special_tokens=tokens, special_texts=texts)
    template.check()
    return template


def by_transformers(name: str, messages: list[Any], tools: Any, prompt: bool = False, source: str | None = None) -> str:
    source = source or (FOLDER / f"{name}.jinja").read_text()
    (text,), _ = render_jinja_template(
        [messages], tools=tools, chat_template=source, add_generation_prompt=prompt, **special_tokens(name)
    )
    return text


def trained(template: ChatTemplate, messages: list[Any], tools: Any = None) -> list[tuple[str, str]]:
    """(what comes before, what is trained) of each turn, in the order of the conversation."""
    found = []
    for document in template.documents(messages, tools):
        edges = [*document.starts[1:], len(document.text)]
        spans = [(s, e) for s, e, role in zip(document.starts, edges, document.roles, strict=True) if role == ASSISTANT]
        joined: list[tuple[int, int]] = []
        for start, end in spans:
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], end)
            elif end > start:
                joined.append((start, end))
        found += [(document.text[:start], document.text[start:end]) for start, end in joined]
    return sorted(found, key=lambda turn: len(turn[0]))


@pytest.mark.parametrize("name", sorted(NO_TEXT))
def test_refused_by_name(name):
    with pytest.raises(UserError, match=rf"template '{name}' (drops the question|refuses this conversation)"):
        template_of(name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [name for name in ORIGINALS if name not in NO_TEXT])
def test_what_follows_the_generation_prompt_is_trained(name, case):
    messages, tools = CASES[case]
    template = template_of(name)
    if name in REFUSED.get(case, ()):
        with pytest.raises(RowError, match=f"'{name}'"):
            template.documents(messages, tools)
        return
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    found = trained(template, messages, tools)
    assert len(found) == len(turns)
    for turn, (before, written) in zip(turns, found, strict=True):
        prompt = by_transformers(name, messages[:turn], tools, prompt=True)
        answered = by_transformers(name, messages[: turn + 1], tools)
        assert before.startswith(prompt)
        skipped = before[len(prompt) :]
        assert not skipped or _EMPTY.fullmatch(skipped), skipped
        if answered.startswith(prompt):  # and perhaps the token with which the next turn would begin
            rest = (before + written).removeprefix(answered.rstrip())
            assert answered.startswith(before + written) or _SPECIAL.fullmatch(rest), rest
        call = "dose" if "tool_calls" in messages[turn] else ""
        for part in (messages[turn]["content"], messages[turn].get("reasoning_content", ""), call):
            assert part in written


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [name for name in MARKED if name not in NO_TEXT])
def test_trl_marks_the_same(name, case):
    """In its own copies of templates, with `{% generation %}`. It also marks the prompt's last words in some, the line
    break or EOS behind a turn, and thoughts that nobody had.
    """
    messages, tools = CASES[case]
    if name in REFUSED.get(case, ()) or "deepseek" in name:  # thoughts are left out there
        return
    if (name, case) == ("diffusion_gemma", "tools"):  # it begins the turn after a result in another way
        return
    source = (FOLDER / f"{name}_training.jinja").read_text()
    (text,), (spans,) = render_jinja_template(
        [messages], tools=tools, chat_template=source, return_assistant_tokens_mask=True, **special_tokens(name)
    )
    joined: list[list[int]] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1][1] = end
        elif end > start:
            joined.append([start, end])
    marks = [text[start:end] for start, end in joined]
    ours = trained(template_of(name), messages, tools)
    assert len(ours) == len(marks)
    for (before, written), mark in zip(ours, marks, strict=True):
        mark = mark.removesuffix("</s>").rstrip("\n") if "phi" in name else mark.rstrip("\n")
        written = written.removesuffix("<|tool_response>")  # at which Gemma 4 stops
        assert mark.endswith(written) or name == "gptoss", (mark, written)
        opening = mark.removesuffix(written)
        assert before.endswith(opening) or _EMPTY.fullmatch(opening) or name == "gptoss", (mark, written)


def test_values_of_switches_become_the_templates_defaults():
    source = (FOLDER / "qwen3.jinja").read_text()
    from tokenize_data.templates import _default

    off = _default("enable_thinking", False, "qwen3", source) + source
    assert by_transformers("qwen3", [USER], None, prompt=True, source=off).endswith(
        "assistant\n<think>\n\n</think>\n\n"
    )
    (text,), _ = render_jinja_template([[USER]], chat_template=off, add_generation_prompt=True, enable_thinking=True)
    assert text.endswith("<|im_start|>assistant\n")  # who asks otherwise is answered otherwise
    ((before, written),) = trained(template_of("qwen3", off), [USER, ANSWER])
    assert before.endswith("assistant\n<think>\n\n</think>\n\n")
    assert written == "Yes.<|im_end|>"


@pytest.mark.parametrize("text", ["{", "[1]", '{"a b": 1}', "1"])
def test_values_that_are_none(text):
    with pytest.raises(UserError, match=r"--chat_template_kwargs .* is no"):
        template_values(text)
