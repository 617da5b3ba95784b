"""Keys that lead into a row: `answer.value`, `answers.text[0]`, in flags and in prompt templates."""

from __future__ import annotations

import pytest

from tests.conftest import pair
from tests.unit.test_masks import DEFAULT, TURN, masks
from tokenize_data import paths
from tokenize_data.dataset import DatasetSpec
from tokenize_data.errors import RowError, UserError
from tokenize_data.examples import read_examples
from tokenize_data.records import RowReader

NESTED = {
    "question": {"text": "Is it?", "lang": "en"},
    "answer": {"value": "Yes.", "aliases": ["Yes.", "It is."]},
    "search_results": {"search_context": ["Doctors say so.", "Others do not."], "rank": [1, 2]},
    "entity.name": "aspirin",
    "meta": {"patient.id": 7, "weights": [2, 0.5]},
}
YES = DEFAULT + TURN + "«Yes.<|im_end|>»\n"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("answer.value", "Yes."),
        ("answer.aliases[1]", "It is."),
        ("answer.aliases[-1]", "It is."),
        ("search_results.search_context[0]", "Doctors say so."),
        ("entity.name", "aspirin"),
        ("meta.patient.id", 7),
        ("meta.weights[1]", 0.5),
        ("question", NESTED["question"]),
    ],
)
def test_a_path_leads_into_the_row(key, value):
    assert paths.has(NESTED, key)
    assert paths.find(NESTED, key) == value


def test_a_key_that_is_there_as_it_is_written_goes_first():
    row = {"a": {"b": ["inner"], "b.c": "with a dot"}, "a.b": "outer", "a.b[0]": "with brackets", "x.y": ["list"]}
    assert [paths.find(row, key) for key in ("a.b", "a.b[0]", "a.b.c", "x.y[0]")] == [
        "outer",
        "with brackets",
        "with a dot",
        "list",
    ]


HAS = "'question', 'answer', 'search_results', 'entity.name', 'meta'"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "answer.valeu",
            "no 'answer.valeu': no key 'valeu' in 'answer': did you mean 'value'? Use --answer_key answer.value; "
            "'answer' has 'value', 'aliases'",
        ),
        (
            "anser.aliases[0]",
            "no 'anser.aliases[0]': no key 'anser' in the row: did you mean 'answer'? Use --answer_key "
            f"answer.aliases[0]; the row has {HAS}",
        ),
        (
            "answer.zzz",
            "no 'answer.zzz': no key 'zzz' in 'answer', which has 'value', 'aliases': name the right one with "
            "--answer_key",
        ),
        (
            "answer.value.text",
            "no 'answer.value.text': 'answer.value' is text ('Yes.'), not an object, so it has no 'text': use "
            "--answer_key answer.value, or leave the row out",
        ),
        (
            "answer.value[0]",
            "no 'answer.value[0]': 'answer.value' is text ('Yes.'), not a list, so it has no [0]: use --answer_key "
            "answer.value, or leave the row out",
        ),
        (
            "answer[0]",
            "no 'answer[0]': 'answer' is an object with 'value', 'aliases', not a list: use --answer_key answer.value, "
            "or leave the row out",
        ),
        (
            "answer.aliases[2]",
            "no 'answer.aliases[2]': 'answer.aliases' is a list of 2, so it has no [2]: use --answer_key "
            "answer.aliases[1] for its last entry, or leave the row out",
        ),
        (
            "answer.aliases.value",
            "no 'answer.aliases.value': 'answer.aliases' is a list of 2, so it has no 'value': use --answer_key "
            "answer.aliases[0].value, or leave the row out",
        ),
        ("a[0", f"no key 'a[0'; the row has {HAS}: name the right one with --answer_key"),
        ("answer.", "no key 'answer.': did you mean 'answer'? Use --answer_key answer; the row has " + HAS),
        (
            "empty[0]",
            "no 'empty[0]': 'empty' is an empty list, so it has no [0]: give it an entry, or leave the row out",
        ),
        ("empty.x", "no 'empty.x': 'empty' is an empty list, so it has no 'x': leave the row out"),
        ("null.x", "no 'null.x': 'null' is null, not an object, so it has no 'x': leave the row out"),
    ],
)
def test_what_is_missing_is_named(key, message):
    row = NESTED | ({"empty": []} if "empty" in key else {"null": None} if "null" in key else {})
    assert not paths.has(row, key)
    with pytest.raises(RowError) as caught:
        paths.find(row, key, "answer_key")
    assert str(caught.value) == message


def test_templates_are_told_what_to_write():
    reader = RowReader(DatasetSpec(files=("x",), prompt="{question.txt}", answer_key="answer.value"), "qa")
    with pytest.raises(RowError, match=r"did you mean 'text'\? Write \{question.text\}; 'question' has 'text', 'lang'"):
        reader.conversation(NESTED)


QA = ("--question_key", "question.text", "--answer_key", "answer.value")


def test_flags(bench):
    assert masks(bench, [NESTED], *QA) == [YES]
    assert masks(bench, [NESTED], "--question_key", "question.text", "--answer_key", "answer.aliases[0]") == [YES]
    (mask,) = masks(bench, [NESTED], *QA, "--system_key", "search_results.search_context[1]")
    assert mask.startswith("<|im_start|>system\nOthers do not.<|im_end|>\n")
    assert masks(bench, [{"doc": {"parts": ["Once upon a time."]}}], "--text_key", "doc.parts[0]") == [
        "Once« upon a time.<|im_end|>»"
    ]
    assert len(masks(bench, [NESTED], *QA, "--weight_key", "meta.weights[0]")) == 2


RECIPE = """\
{name}:
  - files: [{file}]
    prompt: "{{search_results.search_context[0]}} {{question.text}}"
    answer: "{{answer.value}} {{entity.name}}"
    system: "In {{question.lang}}."
"""


def test_templates_of_recipes(bench):
    file = bench.jsonl([NESTED])
    lists = (RECIPE.format(name=name, file=file) for name in ("datasets", "val_datasets"))
    outcome = bench.tokenize("--config", bench.write("".join(lists), "r.yaml"))
    assert outcome.code == 0, outcome.err
    texts = (bench.inspect("--row", 0, run_name=name).out.replace("\n", "|") for name in ("r", "r-val"))
    for text in texts:
        assert "system|In en.<|im_end|>" in text
        assert "user|Doctors say so. Is it?<|im_end|>" in text
        assert "assistant|Yes. aspirin<|im_end|>" in text


def test_groups_of_a_split(bench):
    rows = [pair(f"Is {number}?", "Yes.") | {"meta": {"patient": number // 4}} for number in range(40)]
    outcome = bench.tokenize("--data", bench.jsonl(rows), "--val", "10%", "--val_group", "meta.patient")
    assert outcome.code == 0, outcome.err
    train, val = ({(one["line"] - 1) // 4 for one in bench.documents(name)} for name in ("r", "r-val"))
    assert (len(val), train & val) == (1, set())
    outcome = bench.tokenize("--data", bench.jsonl(rows), "--val", "10%", "--val_group", "meta.patent", run_name="o")
    assert outcome.code == 2
    assert (
        "no row has the key 'meta.patent', which --val_group names: "
        f"{bench.root / 'data.jsonl'} line 1: no 'meta.patent': no key 'patent' in 'meta': did you mean 'patient'? "
        "Use --val_group meta.patient; 'meta' has 'patient'"
    ) in outcome.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((*QA[:2], "--answer_key", "answer.valu"), "line 1: no 'answer.valu': no key 'valu' in 'answer': did you mean"),
        (
            (*QA[:2], "--answer_key", "answer.aliases"),
            "line 1: 'answer.aliases' is a list (['Yes.', 'It is.']), not text: use --answer_key answer.aliases[0] for "
            "its first entry, or leave the row out",
        ),
        (
            (*QA[:2], "--answer_key", "answer"),
            "not text: use --answer_key answer.value for one of its keys ('value', 'aliases'), or leave the row out",
        ),
        (
            (*QA[:2], "--answer_key", "none"),
            "line 1: 'none' is an empty list: write a text there, or leave the row out",
        ),
        (
            ("--text_key", "meta.tex"),
            "line 1: no 'meta.tex': no key 'tex' in 'meta', which has 'patient.id', 'weights'",
        ),
        ((*QA, "--weight_key", "meta.weight"), "no key 'weight' in 'meta': did you mean 'weights'? Use --weight_key"),
    ],
)
def test_bad_rows_name_their_place(bench, flags, message):
    outcome = bench.tokenize("--data", bench.jsonl([NESTED | {"none": []}]), *flags)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert f"{bench.root / 'data.jsonl'} line 1: " in outcome.err
    assert message in outcome.err


def examples(bench, row, answer_key, answers_needed=True):
    spec = DatasetSpec(files=(str(bench.jsonl([row])),), question_key="question.text", answer_key=answer_key)
    (example,) = read_examples(spec, answers_needed=answers_needed).rows
    return example


def test_a_list_of_answers_is_several_references(bench):
    example = examples(bench, NESTED, "answer.aliases")
    assert (example.question, example.references) == ("Is it?", ("Yes.", "It is."))
    assert examples(bench, NESTED, "answer.aliases[1]").references == ("It is.",)
    assert examples(bench, {"question": {"text": "Is it?"}}, "answer.value", answers_needed=False).references == ()


@pytest.mark.parametrize(
    ("answer", "key", "message"),
    [
        ({"aliases": []}, "answer.aliases", "'answer.aliases' is an empty list: write a text there, or leave"),
        ({"aliases": []}, "answer.alias", "did you mean 'aliases'? Use --answer_key answer.aliases"),
        (["a"], "answer[1]", "'answer' is a list of 1, so it has no [1]: use --answer_key answer[0]"),
    ],
)
def test_an_answer_that_is_not_there_is_named(bench, answer, key, message):
    with pytest.raises(UserError) as caught:
        examples(bench, NESTED | {"answer": answer}, key)
    assert "data.jsonl line 1: no answer to compare with: " in str(caught.value)
    assert message in str(caught.value)
