"""Golden masks: what each family's template makes of a conversation, and which of it is trained."""

from __future__ import annotations

import pytest

from tests.families import FAMILIES
from tokenize_data.encode import Encoder
from tokenize_data.errors import RowError, UserError
from tokenize_data.rendered import ASSISTANT
from tokenize_data.templates import choose_template, packaged_templates
from tokenize_data.tokenizer import load_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Is it?"}
ANSWER = {"role": "assistant", "content": "Yes."}
MORE = {"role": "user", "content": "Sure?"}
LAST = {"role": "assistant", "content": "No 1."}

# What is trained stands in «», what the user or the system says in ‹›.
GOLDEN = {
    "gemma": "<bos><start_of_turn>user\n‹Be brief.›\n\n‹Is "
    "it?›<end_of_turn>\n<start_of_turn>model\n«Yes.<end_of_turn>»\n"
    "<start_of_turn>user\n‹Sure?›<end_of_turn>\n<start_of_turn>model\n«No 1.<end_of_turn>»\n",
    "llama2": (
        "<s>[INST] <<SYS>>\n‹Be brief.›\n<</SYS>>\n\n‹Is it?› [/INST]« Yes. </s>»<s>[INST] ‹Sure?› [/INST]« No 1. </s>»"
    ),
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n‹Be "
    "brief.›<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\n‹Is "
    "it?›<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n«Yes.<|eot_id|>»<|start_header_id|>user<|end_header_id|>"
    "\n\n‹Sure?›<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n«No 1.<|eot_id|>»",
    "mistral": "<s>[INST] ‹Be brief.›\n\n‹Is it?› [/INST]«Yes.</s>»[INST] ‹Sure?› [/INST]«No 1.</s>»",
    "qwen": "<|im_start|>system\n‹Be brief.›<|im_end|>\n<|im_start|>user\n‹Is "
    "it?›<|im_end|>\n<|im_start|>assistant\n«Yes.<|im_end|>»\n"
    "<|im_start|>user\n‹Sure?›<|im_end|>\n<|im_start|>assistant\n«No 1.<|im_end|>»\n",
    "phi": "<|system|>\n‹Be brief.›<|end|>\n<|user|>\n‹Is "
    "it?›<|end|>\n<|assistant|>\n«Yes.<|end|>»\n<|user|>\n‹Sure?›<|end|>\n"
    "<|assistant|>\n«No 1.<|end|>»\n",
}
GOLDEN["smollm"] = GOLDEN["qwen"]
GOLDEN["gpt2"] = GOLDEN["qwen"]
GOLDEN["megatron"] = "<s>" + GOLDEN["qwen"]


def marked(document) -> str:
    edges = [*document.starts[1:], len(document.text)]
    text = ""
    for start, end, role in zip(document.starts, edges, document.roles, strict=True):
        piece = document.text[start:end]
        text += piece if role == 0 or not piece else (f"«{piece}»" if role == ASSISTANT else f"‹{piece}›")
    return text.replace("»«", "")


def template_of(family, name):
    return choose_template(FAMILIES[name][4], load_tokenizer(str(family(name))))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_mask(family, name):
    template, _ = template_of(family, name)
    (document,) = template.documents([SYSTEM, USER, ANSWER, MORE, LAST])
    assert marked(document) == GOLDEN[name]


def test_mistral_v3_shows_the_system_message_at_the_last_question_only_so_each_turn_is_a_document(family):
    template, _ = template_of(family, "mistral_v3")
    documents = [marked(document) for document in template.documents([SYSTEM, USER, ANSWER, MORE, LAST])]
    assert documents == [
        "<s>[INST] ‹Be brief.›\n\n‹Is it?›[/INST]« Yes.</s>»",
        "<s>[INST] ‹Is it?›[/INST] Yes.</s>[INST] ‹Be brief.›\n\n‹Sure?›[/INST]« No 1.</s>»",
    ]
    assert [marked(d) for d in template.documents([USER, ANSWER, MORE, LAST])] == [
        "<s>[INST] ‹Is it?›[/INST]« Yes.</s>»[INST] ‹Sure?›[/INST]« No 1.</s>»"
    ]


def test_default_system_message_of_a_template_is_template(family):
    template, _ = template_of(family, "smollm")
    (document,) = template.documents([USER, ANSWER])
    assert marked(document).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    )


def test_a_template_that_strips_contents_is_followed(family):
    template, _ = template_of(family, "llama3")
    (document,) = template.documents(
        [{"role": "user", "content": "  hi \n"}, {"role": "assistant", "content": "\n yes "}]
    )
    assert marked(document).endswith(
        "\n\n‹hi›<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n«yes<|eot_id|>»"
    )


THINKING = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' -%}"
    "{%- set text = m.content.split('</think>')[-1].lstrip('\n') -%}"
    "{%- if loop.last -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}{{- text -}}"
    "{%- else -%}{{- m.content -}}{%- endif -%}{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def thinking_template(family, tmp_path):
    (tmp_path / "thinking.jinja").write_text(THINKING)
    return choose_template(str(tmp_path / "thinking.jinja"), load_tokenizer(str(family("qwen"))))[0]


def test_a_template_that_rewrites_history_gives_a_document_for_each_turn(family, tmp_path):
    """As Qwen 3 does: an answer has an empty thinking block, which later turns do not show, and nobody wrote."""
    documents = [marked(d) for d in thinking_template(family, tmp_path).documents([USER, ANSWER, MORE, LAST])]
    ask = "<|im_start|>user\n‹Is it?›<|im_end|>\n<|im_start|>assistant\n"
    assert documents == [
        ask + "<think>\n\n</think>\n\n«Yes.<|im_end|>»\n",
        ask
        + "Yes.<|im_end|>\n<|im_start|>user\n‹Sure?›<|im_end|>\n<|im_start|>assistant\n"
        + "<think>\n\n</think>\n\n«No 1.<|im_end|>»\n",
    ]


def test_thoughts_that_a_template_leaves_out_are_not_lost_silently(family, tmp_path):
    template = thinking_template(family, tmp_path)
    with pytest.raises(RowError, match=r"thinking\.jinja' leaves out thoughts of message 2, or rewrites it: change"):
        template.documents([USER, {"role": "assistant", "content": "<think>why</think>\n\nYes."}])


def test_a_turn_of_weight_0_is_not_trained(family):
    template, _ = template_of(family, "gpt2")
    (document,) = template.documents([USER, {**ANSWER, "weight": 0}, MORE, LAST])
    assert "«Yes" not in marked(document)
    assert "«No 1.<|im_end|>»" in marked(document)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}{{ m.content }", "does not compile: line 1"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "drops the answer"),
        (
            "{% for m in messages %}{% if m.role != 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            "drops the question",
        ),
        ("{{ messages[0].content }}{{ messages[1].content }}{{ ''.__class__.__mro__ }}", "refuses this conversation"),
        (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}",
            "lacks: <|user|> <|end|> <|assistant|>; list them",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}Write:{% endif %}",
            "Write:' but does not write the answer after it",
        ),
        ("{{ raise_exception('no thanks') }}", "no thanks"),
    ],
)
def test_unusable_templates_are_refused_before_any_row(family, tmp_path, source, message):
    (tmp_path / "own.jinja").write_text(source)
    with pytest.raises(UserError, match=r".") as error:
        choose_template(str(tmp_path / "own.jinja"), load_tokenizer(str(family("gpt2"))))
    assert message in str(error.value)


def test_a_template_that_is_not_there_names_those_that_are(family):
    with pytest.raises(UserError) as error:
        choose_template("lama3", load_tokenizer(str(family("gpt2"))))
    assert "No such file" in str(error.value)
    assert all(name in str(error.value) for name in packaged_templates())


def test_a_conversation_that_the_template_refuses_is_a_row_error(family):
    template, _ = template_of(family, "gemma")
    with pytest.raises(RowError, match="alternation"):
        template.documents([USER, USER, ANSWER])


def test_megatron_adds_its_tokens_and_bos_where_the_tokenizer_has_one(family):
    template, tokenizer = template_of(family, "megatron")
    assert tokenizer.added == ("<|im_start|>", "<|im_end|>")
    (document,) = template.documents([USER, ANSWER])
    (encoded,) = Encoder(tokenizer).encode([document])
    bos = tokenizer.backend.token_to_id("<s>")
    assert encoded.ids.tolist().count(bos) == 1
    assert encoded.ids[0] == bos


SWITCHED = (  # as SmolLM 3: thoughts stand in the content, and a switch writes an empty block into prompt and answer
    "{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}"
    "{%- set opening = '<|im_start|>assistant\n' + ('' if enable_thinking else '<think>\n\n</think>\n') -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'assistant' -%}{{- opening + m.content.lstrip('\n') + '<|im_end|>\n' -}}"
    "{%- else -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- opening -}}{%- endif -%}"
)


@pytest.mark.parametrize("thinks", [True, False])
def test_thoughts_that_a_template_knows_in_the_content_only(family, tmp_path, thinks):
    (tmp_path / "switched.jinja").write_text(SWITCHED)
    tokenizer = load_tokenizer(str(family("qwen")))
    template, _ = choose_template(str(tmp_path / "switched.jinja"), tokenizer, {"enable_thinking": thinks})
    asked = "<|im_start|>user\n‹Is it?›<|im_end|>\n<|im_start|>assistant\n"
    (plain,) = template.documents([USER, ANSWER])
    assert marked(plain) == asked + ("" if thinks else "<think>\n\n</think>\n") + "«Yes.<|im_end|>»\n"
    thought = {**ANSWER, "reasoning_content": "So it seems.", "thinking": "So it seems."}
    if thinks:
        (document,) = template.documents([USER, thought])
        assert marked(document) == asked + "«<think>\nSo it seems.\n</think>\n\nYes.<|im_end|>»\n"
