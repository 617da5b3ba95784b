"""Formats of rows and files, several data sets in one run, cleaning, samples and weights."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from tokenizers import Tokenizer

import tokenize_data
from tests.conftest import pair
from tokenize_data.dataset import DatasetSpec
from tokenize_data.errors import UserError
from tokenize_data.records import RowReader, recognise

CHAT = {"messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]}
TWO_TURNS = {
    "messages": [*CHAT["messages"], {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "No."}]
}
SHAREGPT = {"conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "Yes."}]}
SIZES = (("one", 60), ("two", 39))  # rows of two files
ALPACA = {"instruction": "Is it?", "input": "", "output": "Yes."}


def texts(bench, run_name="r"):
    """(all of a document, what is trained of it) as text."""
    folder = bench.tokenized / run_name
    tokenizer = Tokenizer.from_file(str(folder / bench.manifest(run_name)["tokenizer"]["folder"] / "tokenizer.json"))
    result = []
    for document in bench.documents(run_name):
        trained = [token for token, learn in zip(document["ids"], document["trained"], strict=True) if learn]
        result.append(
            (
                tokenizer.decode(document["ids"], skip_special_tokens=False),
                tokenizer.decode(trained, skip_special_tokens=False),
            )
        )
    return result


@pytest.mark.parametrize(
    ("row", "name", "trained"),
    [
        (pair(), "qa", "Yes.<|im_end|>"),
        (CHAT, "chat", "Yes.<|im_end|>"),
        (TWO_TURNS, "chat", "Yes.<|im_end|>No.<|im_end|>"),
        (SHAREGPT, "sharegpt", "Yes.<|im_end|>"),
        (ALPACA, "alpaca", "Yes.<|im_end|>"),
    ],
)
def test_formats_are_recognised_and_named(bench, row, name, trained):
    outcome = bench.tokenize("--data", bench.jsonl([row, row]))
    assert outcome.code == 0, outcome.err
    assert f"format {name} (" in outcome.out
    assert "recognised" in outcome.out
    assert [text for _, text in texts(bench)] == [trained, trained]
    assert "user\nIs it?<|im_end|>" in texts(bench)[0][0]


def test_plain_text_is_trained_from_the_second_token_to_eos(bench):
    outcome = bench.tokenize("--data", bench.jsonl([{"text": "Once upon a time."}]))
    assert "format text (text), recognised" in outcome.out
    (document,) = bench.documents()
    assert document["trained"] == [0] + [1] * (len(document["ids"]) - 1)
    assert texts(bench)[0][0] == "Once upon a time.<|im_end|>"


def test_plain_text_with_bos(bench, family):
    bench.tokenize("--data", bench.jsonl([{"text": "The patient."}]), checkpoint=family("llama2"))
    (document,) = bench.documents()
    assert document["roles"][0] == "template"
    assert set(document["roles"][1:]) == {"assistant"}
    assert texts(bench)[0][0].startswith("<s>")


def test_alpaca_with_input(bench):
    bench.tokenize("--data", bench.jsonl([{"instruction": "Add.", "input": "1 2", "output": "3"}]))
    assert "user\nAdd.\n\n1 2<|im_end|>" in texts(bench)[0][0]


def test_format_can_be_forced(bench):
    row = {**CHAT, **ALPACA}
    outcome = bench.tokenize("--data", bench.jsonl([row]), "--format", "alpaca")
    assert "format alpaca (instruction, input -> output), given" in outcome.out


def test_own_keys_and_system(bench):
    row = {"q": "Is it?", "a": "Yes.", "s": "Be brief."}
    outcome = bench.tokenize(
        "--data", bench.jsonl([row]), "--question_key", "q", "--answer_key", "a", "--system_key", "s"
    )
    assert outcome.code == 0, outcome.err
    (document,) = bench.documents()
    assert {"system", "user", "assistant", "template"} == set(document["roles"])
    assert texts(bench)[0][0] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIs "
        "it?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant message"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
            "has weight 0",
        ),
        ({"messages": "a"}, "'messages' is text, not a list"),
        ({"messages": ["a"]}, "message 1 is text, not an object"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "role 'usr': use one of system"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "role ['user']: use one of system"),
        ({"messages": [{"role": "user", "content": 5}]}, "message 1: 'content' is a number"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]}, "1 has the call {'id': 1}"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "only an assistant calls"),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "from 'bot'"),
        ({"instruction": "a", "output": ""}, "'output' is empty"),
        ({"text": " "}, "'text' is empty"),
    ],
)
def test_bad_conversations(bench, row, message):
    outcome = bench.tokenize("--data", bench.jsonl([row]))
    assert outcome.code == 2
    assert message in outcome.err


def test_content_in_parts(bench):
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Is "}, {"type": "text", "text": "it?"}]},
            CHAT["messages"][1],
        ]
    }
    assert bench.tokenize("--data", bench.jsonl([row])).code == 0
    assert "user\nIs it?<|im_end|>" in texts(bench)[0][0]


def test_files_of_all_kinds_give_the_same_documents(bench):
    rows = [pair(f"Is {number}?", f"Yes {number}.") for number in range(5)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    import pyarrow as pa
    import pyarrow.parquet as parquet
    from datasets import Dataset

    parquet.write_table(pa.Table.from_pylist(rows), bench.root / "p.parquet")
    Dataset.from_list(rows).save_to_disk(str(bench.root / "saved"))
    (bench.root / "folder").mkdir()
    half = len(lines) // 2
    two_frames = zstandard.ZstdCompressor().compress(lines[:half]) + zstandard.ZstdCompressor().compress(lines[half:])
    files = {
        "plain": bench.write(lines, "a.jsonl"),
        "bom": bench.write(b"\xef\xbb\xbf" + lines, "bom.jsonl"),
        "crlf": bench.write(lines.replace(b"\n", b"\r\n"), "crlf.jsonl"),
        "blank-lines": bench.write(lines.replace(b"\n", b"\n\n"), "blank.jsonl"),
        "no-last-newline": bench.write(lines.rstrip(), "end.jsonl"),
        "gz": bench.write(gzip.compress(lines), "a.jsonl.gz"),
        "zst": bench.write(two_frames, "a.jsonl.zst"),
        "json-list": bench.write(json.dumps(rows), "a.json"),
        "json-lines": bench.write(lines, "b.json"),
        "csv": bench.write("prompt,gold\n" + "".join(f"Is {n}?,Yes {n}.\n" for n in range(5)), "a.csv"),
        "tsv": bench.write("prompt\tgold\n" + "".join(f"Is {n}?\tYes {n}.\n" for n in range(5)), "a.tsv"),
        "parquet": bench.root / "p.parquet",
        "saved": bench.root / "saved",
        "folder": bench.write(lines, "folder/train.jsonl").parent,
    }
    expected = None
    for name, path in files.items():
        outcome = bench.tokenize("--data", path, run_name=name)
        assert outcome.code == 0, (name, outcome.err)
        ids = [document["ids"] for document in bench.documents(name)]
        expected = expected or ids
        assert ids == expected, name


def test_several_files_keep_their_order_and_lines(bench):
    one = bench.jsonl([pair("1"), pair("2")], "one.jsonl")
    two = bench.jsonl([pair("3")], "two.jsonl")
    bench.tokenize("--data", one, two)
    assert [(document["file"].split("/")[-1], document["line"]) for document in bench.documents()] == [
        ("one.jsonl", 1),
        ("one.jsonl", 2),
        ("two.jsonl", 1),
    ]


def test_validation_files_become_their_own_data_set(bench):
    outcome = bench.tokenize("--data", bench.jsonl([pair()]), "--val", bench.jsonl([pair("v"), pair("w")], "val.jsonl"))
    assert outcome.code == 0
    assert (bench.manifest("r")["documents"], bench.manifest("r-val")["documents"]) == (1, 2)


MIX = """
datasets:
  - name: summaries
    files: [dialogues.jsonl]
    prompt: "Summarise the dialogue:\\n{dialogue}"
    answer_key: summary
  - name: context questions
    files: [squad.jsonl]
    prompt: "{context}\\n\\nQuestion: {question}"
    answer: "Answer: {answer}"
    samples: 3
  - name: reviews
    files: [reviews.jsonl]
    question_key: review
    answer_key: stars
    weight: 2
    clean: {drop: '[^a-zA-Z0-9\\s]', lower: true, strip: true}
lr: 1e-5
"""


def test_a_mix_of_data_sets(bench, monkeypatch):
    monkeypatch.chdir(bench.root)
    bench.jsonl([{"dialogue": "A: hi\nB: ho", "summary": "They greet."}], "dialogues.jsonl")
    bench.jsonl([{"context": f"C{n}.", "question": "Q?", "answer": str(n)} for n in range(10)], "squad.jsonl")
    bench.jsonl([{"review": " GREAT!!! (really) ", "stars": "5 *"}], "reviews.jsonl")
    outcome = bench.tokenize("--config", bench.write(MIX, "mix.yaml"))
    assert outcome.code == 0, outcome.err
    found = texts(bench)
    assert "user\nSummarise the dialogue:\nA: hi\nB: ho<|im_end|>" in found[0][0]
    assert len(found) == 1 + 3 + 2
    assert all("Question: Q?" in text and trained.startswith("Answer: ") for text, trained in found[1:4])
    assert found[4] == found[5]
    assert "user\ngreat really<|im_end|>" in found[4][0]
    assert found[4][1] == "5<|im_end|>"
    assert "5 rows read = 5 accepted + 0 rejected; 7 more left out" in outcome.out
    chosen = [text for text, _ in found[1:4]]
    bench.tokenize("--config", bench.root / "mix.yaml", "--retokenize")
    assert [text for text, _ in texts(bench)[1:4]] == chosen
    bench.tokenize("--config", bench.root / "mix.yaml", "--retokenize", "--seed", "5")
    assert [text for text, _ in texts(bench)[1:4]] != chosen


@pytest.mark.parametrize(("weight", "taken"), [(0.25, 25), (0.5, 50), (0.499, 49), (1.3, 129), (2.5, 248), (0.004, 0)])
def test_weights_take_exactly_their_share_of_the_rows(bench, weight, taken):
    """Of 99 rows in two files. A fraction of a copy goes to rows that are drawn by seed."""
    one, two = (bench.jsonl([pair(f"{name} {n}?") for n in range(count)], f"{name}.jsonl") for name, count in SIZES)
    recipe = bench.write(f"datasets:\n  - files: [{one}, {two}]\n    weight: {weight}\n", "r.yaml")
    outcome = bench.tokenize("--config", recipe)
    if not taken:
        assert outcome.code == 2
        return
    assert outcome.code == 0, outcome.err
    found = [text for text, _ in texts(bench)]
    assert len(found) == taken == bench.manifest()["documents"]
    copies = Counter(found).values()
    assert set(copies) <= {int(weight), int(weight) + 1}
    assert bench.tokenize("--config", recipe, "--seed", 5, run_name="other").code == 0
    assert bench.manifest("other")["documents"] == taken


def test_a_weight_is_a_share_of_what_a_split_leaves(bench):
    data = bench.jsonl([pair(f"{n}?") for n in range(200)])
    recipe = bench.write(f"datasets:\n  - files: [{data}]\n    weight: 0.5\n", "r.yaml")
    assert bench.tokenize("--config", recipe, "--val", "10%").code == 0
    assert [bench.manifest(name)["documents"] for name in ("r", "r-val")] == [90, 20]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("datasets: 5", "datasets must be a list"),
        ("datasets: [{file: a}]", "unknown key 'file': did you mean 'files'?"),
        ("datasets: [{prompt: a}]", "has no 'files'"),
        ("datasets: [{files: []}]", "has no files"),
        ("datasets: [{files: [a], weight: no}]", "weight must be int or float"),
        ("datasets: [{files: [a], weight: 0}]", "weight 0 must be above 0"),
        ("datasets: [{files: [a], samples: 0}]", "samples 0 must be at least 1"),
        ("datasets: [{files: [a], samples: 5, weight: 2}]", "give one of them"),
        ("datasets: [{files: [a], clean: {drp: x}}]", "did you mean 'drop'?"),
        ("datasets: [{files: [a], clean: {drop: '['}}]", "not a regular expression"),
        ("datasets: [", "not valid YAML"),
        ("[1]", "a recipe is a mapping"),
        ("datasets: [{files: [!!python/object:os.system a]}]", "not valid YAML"),
    ],
)
def test_bad_recipes(bench, recipe, message):
    outcome = bench.tokenize("--config", bench.write(recipe, "bad.yaml"))
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert message in outcome.err


def test_more_samples_than_rows(bench):
    bench.jsonl([pair()])
    recipe = bench.write(f"datasets:\n  - files: [{bench.root}/data.jsonl]\n    samples: 2\n", "r.yaml")
    assert "has 1 rows, fewer than samples 2" in bench.tokenize("--config", recipe).err


def test_recognition_prefers_what_the_user_names():
    spec = DatasetSpec(files=("x",), question_key="q")
    assert recognise([{**CHAT, "q": "a", "gold": "b"}], spec) == "qa"
    assert recognise([{**CHAT, **pair()}], DatasetSpec(files=("x",))) == "qa"


def test_prompt_templates_know_braces_and_name_missing_fields():
    reader = RowReader(DatasetSpec(files=("x",), prompt="{{{a}}}", answer_key="b"), "qa")
    assert reader.conversation({"a": "1", "b": "2"}).messages[0]["content"] == "{1}"
    with pytest.raises(UserError, match="no key 'a'"):
        reader.conversation({"A1": "1", "b": "2"})


def test_messages_with_keys_of_their_own(bench, monkeypatch):
    monkeypatch.setattr("tokenize_data.chat._MOST_KEPT", 3)
    rows = [{"messages": [{**CHAT["messages"][0], "time": number}, CHAT["messages"][1]]} for number in range(10)]
    assert bench.tokenize("--data", bench.jsonl(rows)).code == 0
    assert [trained for _, trained in texts(bench)] == ["Yes.<|im_end|>"] * 10


_EXAM = '''"""Exams: a question, its choices, and the number of the right one."""

from tokenize_data.fields import Conversation
from tokenize_data.formats.interface import RowFormat, all_have


def _read(row, fields):
    question = fields.text(row, "stem") + "".join(f"\\n{letter}. {choice}" for letter, choice in row["choices"].items())
    answer = fields.text(row, "right")
    return Conversation(messages=[{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


FORMAT = RowFormat(
    read=_read,
    is_like=lambda rows, spec: all_have(rows, "stem", "choices"),
    keys=lambda spec: "stem, choices -> right",
)
'''


def test_a_new_format_is_one_file_and_one_name(bench):
    """In a copy of the package: recognised, and forced by its flag."""
    package = bench.root / "package" / "tokenize_data"
    shutil.copytree(Path(tokenize_data.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(Path(tokenize_data.__file__).parents[1] / "checkpoints.toml", package.parent / "checkpoints.toml")
    (package / "formats" / "exam.py").write_text(_EXAM)
    table = package / "dataset.py"
    table.write_text(table.read_text().replace('FORMATS = ("qa", ', 'FORMATS = ("exam", "qa", ', 1))
    data = bench.jsonl([{"stem": "Is it?", "choices": {"A": "yes", "B": "no"}, "right": "A"}] * 2)
    for run_name, flags, how in (("found", [], "recognised"), ("forced", ["--format", "exam"], "given")):
        command = [sys.executable, "-m", "tokenize_data", "--run_name", run_name, "--data", data, "--checkpoint"]
        command += [bench.base, "--tokenized_data_dir", bench.tokenized, "--workers", "1", *flags]
        done = subprocess.run(command, cwd=package.parent, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert f"format exam (stem, choices -> right), {how}" in done.stdout
        ((whole, trained), _) = texts(bench, run_name)
        assert "user\nIs it?\nA. yes\nB. no<|im_end|>" in whole
        assert trained == "A<|im_end|>"
