"""LLaMA-Factory's `dataset_info.json`: each form of entry, what of its rows is trained, and what is rejected."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer

from tests.real_parts import trl_templates
from tests.unit.test_masks import AGAIN, CALLED, DEFAULT, RETURNED, TURN
from tests.unit.test_public_templates import TOOLS

CALL = {"name": "dose", "arguments": {"drug": "aspirin"}}
ANSWER = "«Yes.<|im_end|>»\n"


@pytest.fixture
def entry(bench):
    """Writes rows and their entry; returns the entry's name for --data."""

    def write(rows, name="demo", file="demo.json", **facts):
        folder = bench.root / "lf data"
        folder.mkdir(exist_ok=True)
        (folder / file).write_text(json.dumps(rows))
        info = folder / "dataset_info.json"
        known = json.loads(info.read_text()) if info.exists() else {}
        info.write_text(json.dumps({**known, name: {"file_name": file, **facts}}))
        return f"{info}:{name}"

    return write


def masks(bench, *flags, run_name="r"):
    outcome = bench.tokenize(*flags, run_name=run_name)
    assert outcome.code == 0, outcome.err
    folder = bench.tokenized / run_name / bench.manifest(run_name)["tokenizer"]["folder"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = []
    for document in bench.documents(run_name):
        text, was = "", 0
        for token, learn in zip(document["ids"], document["trained"], strict=True):
            text += ("»" if was and not learn else "«" if learn and not was else "") + tokenizer.decode([token], False)
            was = learn
        found.append(text)
    return found


GOLDEN = {
    "alpaca, its own names": ({"instruction": "Is", "input": "it?", "output": "Yes."}, {}, "Is\nit?"),
    "alpaca, an empty input": ({"instruction": "Is it?", "input": "", "output": "Yes."}, {}, "Is it?"),
    "alpaca, an input that no column names": (
        {"q": "Is it?", "input": "left out", "a": "Yes."},
        {"columns": {"prompt": "q", "response": "a"}},
        "Is it?",
    ),
    "sharegpt, other tags": (
        {"dialog": [{"who": "patient", "says": "Is it?"}, {"who": "doctor", "says": "Yes."}]},
        {
            "formatting": "sharegpt",
            "columns": {"messages": "dialog"},
            "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "patient", "assistant_tag": "doctor"},
        },
        "Is it?",
    ),
    "openai": (
        {"messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]},
        {"formatting": "openai"},
        "Is it?",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_what_an_entry_trains(bench, entry, name):
    row, facts, question = GOLDEN[name]
    assert masks(bench, "--data", entry([row], **facts)) == [DEFAULT + TURN.replace("Is it?", question) + ANSWER]


def test_history_and_system(bench, entry):
    row = {"instruction": "Sure?", "output": "No.", "history": [["Is it?", "Yes."]], "rule": "Be brief."}
    columns = {"prompt": "instruction", "response": "output", "history": "history", "system": "rule"}
    brief = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert masks(bench, "--data", entry([row], columns=columns)) == [
        brief + TURN + ANSWER + AGAIN + "«No.<|im_end|>»\n"
    ]


@pytest.mark.parametrize("call", [json.dumps(CALL), json.dumps([CALL])])
def test_calls_are_trained_and_their_results_are_not(bench, entry, call):
    turns = [("human", "Is it?"), ("function_call", call), ("observation", "100 mg"), ("gpt", "Yes.")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns], "functions": json.dumps(TOOLS)}
    data = entry([row], formatting="sharegpt", columns={"messages": "conversations", "tools": "functions"})
    (found,) = masks(bench, "--data", data, "--template", trl_templates() / "qwen2_5.jinja")
    assert "dose" in found.split("Is it?")[0]  # the tools are shown to the model
    assert found.endswith(f"«{CALLED}»\n{RETURNED}«Yes.<|im_end|>»\n")


def test_entries_are_data_sets_of_their_own(bench, entry):
    one = entry([{"instruction": f"Is it {n}?", "output": "Yes."} for n in range(9)], "one", "one.json", num_samples=4)
    two = entry([{"q": "Is it?", "a": "No."}], "two", "two.json", columns={"prompt": "q", "response": "a"})
    plain = bench.jsonl([{"prompt": "Is it?", "gold": "Perhaps."}], "plain.jsonl")
    outcome = bench.tokenize("--data", plain, one, two, "--val", two)
    assert outcome.code == 0, outcome.err
    datasets = bench.manifest()["datasets"]
    assert [(dataset["name"], dataset["format"]) for dataset in datasets] == [
        ("", "qa"),
        ("one", "columns"),
        ("two", "columns"),
    ]
    assert bench.manifest()["documents"] == 1 + 4 + 1
    assert bench.manifest("r-val")["documents"] == 1
    again = bench.tokenize("--data", plain, one, two, "--val", two)
    assert again.code == 0
    assert "made with" not in again.err
    changed = entry([{"q": "Is it?", "a": "No."}], "two", "two.json", columns={"prompt": "a", "response": "q"})
    assert "columns: made with" in bench.tokenize("--data", plain, one, changed, "--val", two).err


def test_an_entry_in_a_recipe_with_settings_of_its_own(bench, entry):
    turns = [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "Yes."}]
    more = [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "No."}]
    data = entry([{"conversations": turns + more}], formatting="sharegpt")
    recipe = bench.root / "recipe.yaml"
    recipe.write_text(json.dumps({"datasets": [{"files": [data], "train_on": "last", "name": "mine"}]}))
    expected = DEFAULT + TURN + "Yes.<|im_end|>\n" + AGAIN + "«No.<|im_end|>»\n"
    assert masks(bench, "--config", recipe) == [expected]
    assert bench.manifest()["datasets"][0]["name"] == "mine"


def test_columns_of_a_recipe(bench):
    file = bench.jsonl([{"q": "Is it?", "a": "Yes."}])
    recipe = bench.root / "recipe.yaml"
    recipe.write_text(json.dumps({"datasets": [{"files": [str(file)], "columns": {"prompt": "q", "response": "a"}}]}))
    assert masks(bench, "--config", recipe) == [DEFAULT + TURN + ANSWER]
    recipe.write_text(json.dumps({"datasets": [{"files": [str(file)], "columns": {"prompt": "q"}}]}))
    assert "columns: response is missing" in bench.tokenize("--config", recipe, run_name="other").err


REJECTED = {
    "ranking": ({"ranking": True}, "'demo' has ranking: true: preferences are not trained here, only answers"),
    "pictures": ({"columns": {"images": "images"}}, "columns has images: pictures are not trained here, only texts"),
    "a key": ({"file_nam": "x"}, "unknown key 'file_nam': did you mean file_name?"),
    "formatting": ({"formatting": "share"}, "formatting is 'share': use one of alpaca, sharegpt, openai"),
    "a column": ({"columns": {"messages": "x"}}, "columns has messages, which alpaca does not have"),
    "no response": ({"columns": {"prompt": "q"}}, "'demo': columns: response is missing: name the key where rows of"),
    "a tag": ({"formatting": "sharegpt", "tags": {"bot_tag": "x"}}, "tags has bot_tag: known are role_tag"),
    "samples": ({"num_samples": 0}, "num_samples is 0, not a whole number above 0"),
    "columns": ({"columns": ["q"]}, "columns is ['q'], not an object of texts"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_what_is_not_trained_is_said(bench, entry, name):
    facts, message = REJECTED[name]
    outcome = bench.tokenize("--data", entry([{"instruction": "A?", "output": "B."}], **facts))
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_where_rows_are(bench, entry):
    data = entry([], "here")
    info = bench.root / "lf data" / "dataset_info.json"
    info.write_text(json.dumps({"a": {"ms_hub_url": "x/y"}, "b": {"script_url": "b"}, "c": {"hf_hub_url": 5}}))
    at = data.removesuffix(":here")
    for name, message in [
        (":a", "'a' has only a ms_hub_url: fetch the rows, and give it a file_name"),
        (":b", "'b' has only a script_url"),
        (":c", "hf_hub_url is 5, not a text"),
        (":dd", f"{at} has no entry 'dd': write {at}:ENTRY with a, b, c"),
        ("", f"{at} names no entry: write {at}:ENTRY with a, b, c"),
    ]:
        outcome = bench.tokenize("--data", f"{at}{name}")
        assert outcome.code == 2
        assert message in outcome.err
    info.write_text("{")
    assert "is not valid JSON" in bench.tokenize("--data", f"{at}:a").err
    info.unlink()
    assert "cannot be read: No such file or directory" in bench.tokenize("--data", f"{at}:a").err


def test_a_hub_data_set_is_named_as_data_would_name_it():
    from tokenize_data.dataset import DatasetSpec
    from tokenize_data.dataset_info import _place, expanded

    assert expanded((DatasetSpec(files=("x.jsonl",)),)) == (DatasetSpec(files=("x.jsonl",)),)
    places = [
        ({"hf_hub_url": "me/data"}, "me/data"),
        ({"hf_hub_url": "me/data", "split": "train_sft"}, "me/data:train_sft"),
        ({"hf_hub_url": "me/data", "subset": "en"}, "me/data:en:train"),
        ({"hf_hub_url": "me/data", "subset": "en", "split": "test"}, "me/data:en:test"),
    ]
    assert [_place(given, None, "x") for given, _ in places] == [name for _, name in places]


def test_settings_that_an_entry_makes_itself_are_rejected(bench, entry):
    data = entry([{"instruction": "A?", "output": "B."}])
    outcome = bench.tokenize("--data", data, "--format", "alpaca")
    assert outcome.code == 2
    assert "says how its rows are read: leave format out" in outcome.err
    two = bench.tokenize("--data", data, data, "--samples", "1")
    assert "samples 1 is for one data set, and there are 2: name one at a time" in two.err


def test_a_folder_with_entries_lists_them(bench, entry):
    entry([{"instruction": "A?", "output": "B."}], "one")
    entry([{"instruction": "A?", "output": "B."}], "two")
    outcome = bench.tokenize("--data", bench.root / "lf data")
    assert outcome.code == 2
    assert "lf data has a dataset_info.json with the data sets one, two: name one, such as" in outcome.err
    assert outcome.err.rstrip().endswith("lf data/dataset_info.json:one")


def test_hugging_face_s_file_of_that_name_is_another_one(bench):
    folder = bench.root / "saved"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "A?", "gold": "B."}) + "\n")
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"prompt": {}}, "splits": {"train": {}}}))
    assert bench.tokenize("--data", folder).code == 0


def test_bad_rows_name_file_row_key_and_remedy(bench, entry):
    columns = {"prompt": "q", "response": "a", "history": "h"}
    for row, message in [
        ({"q": "", "a": "B."}, "demo.json row 1: 'q' is empty"),
        ({"q": "A?"}, "demo.json row 1: no key 'a'"),
        ({"q": "A?", "a": "B.", "h": ["x"]}, "'h' is ['x'], not a list of pairs of a question and an answer"),
        ({"q": "A?", "a": "B.", "h": [["x", 5]]}, "'h' pair 1, the assistant's text is a number (5), not text"),
    ]:
        outcome = bench.tokenize("--data", entry([row], columns=columns))
        assert outcome.code == 2
        assert message in outcome.err, outcome.err
