"""`tokenize_data --append`: new files become new shards, and what was there stays."""

from __future__ import annotations

import os

import pytest

from tests.conftest import pair
from tokenize_data.reader import ShardReader


def rows(first, count):
    return [pair(f"Question {number}?", f"Answer {number}.") for number in range(first, first + count)]


def shards(bench, run_name="r"):
    manifest = bench.manifest(run_name)
    folder = bench.tokenized / run_name
    return {shard["file"]: (folder / shard["file"]).read_bytes() for shard in manifest["shards"]}


def contents(bench, run_name="r"):
    kept = ("row", "ids", "roles", "trained", "cut", "file", "line")
    return [{key: document[key] for key in kept} for document in bench.documents(run_name)]


def test_appended_rows_are_those_of_one_build(bench):
    one, two = bench.jsonl(rows(0, 1500), "one.jsonl"), bench.jsonl(rows(1500, 30), "two.jsonl")
    assert bench.tokenize("--data", one).code == 0
    before = shards(bench)
    outcome = bench.tokenize("--data", two, "--append")
    assert outcome.code == 0, outcome.err
    assert "30 documents appended to the 1,500 of" in outcome.out
    assert bench.tokenize("--data", one, two, run_name="whole").code == 0
    assert contents(bench) == contents(bench, "whole")
    after = shards(bench)
    assert all(after[name] == content for name, content in before.items())
    assert len(after) == len(before) + 1
    joined, whole = bench.manifest(), bench.manifest("whole")
    for key in ("documents", "tokens", "trained_tokens", "role_tokens", "rows", "datasets", "tokenizer", "num_open"):
        expected = {**whole[key], "folder": joined[key]["folder"]} if key == "tokenizer" else whole[key]
        assert joined[key] == expected, key
    reader = ShardReader(bench.tokenized / "r", verify=True)
    assert reader.place(1500) == (str(two), 1)
    on_disk = {entry.name for entry in (bench.tokenized / "r").iterdir()}
    assert on_disk == {"manifest.json"} | {info.file.split("/")[0] for info in reader.manifest.all_files()}


def test_appending_again_changes_nothing(bench):
    one, two = bench.jsonl(rows(0, 9), "one.jsonl"), bench.jsonl(rows(9, 3), "two.jsonl")
    bench.tokenize("--data", one)
    bench.tokenize("--data", one, two, "--append")
    assert len(contents(bench)) == 12
    manifest = bench.manifest()
    outcome = bench.tokenize("--data", one, two, "--append")
    assert outcome.code == 0
    assert f"{two} is already among the shards (as {two}): left out" in outcome.out
    assert "nothing to append: using" in outcome.out
    assert bench.manifest() == manifest
    plain = bench.tokenize("--data", one, two)  # the same files without the flag: they fit
    assert plain.code == 0
    assert "warning" not in plain.err


def test_other_reading_is_a_data_set_of_its_own(bench):
    bench.tokenize("--data", bench.jsonl(rows(0, 9), "one.jsonl"))
    chat = [{"messages": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes."}]}]
    outcome = bench.tokenize("--data", bench.jsonl(chat, "chat.jsonl"), "--append")
    assert outcome.code == 0, outcome.err
    assert [dataset["format"] for dataset in bench.manifest()["datasets"]] == ["qa", "chat"]
    assert [len(part) for part in ShardReader(bench.tokenized / "r").parts.values()] == [9, 1]


def test_rejected_rows_stay_on_the_list(bench):
    bench.tokenize("--data", bench.jsonl([*rows(0, 3), {"x": 1}], "one.jsonl"), "--max_bad_rows", "1")
    bench.tokenize("--data", bench.jsonl([*rows(3, 3), {"y": 1}], "two.jsonl"), "--max_bad_rows", "1", "--append")
    lines = (bench.tokenized / "r" / "rejected.jsonl").read_text().splitlines()
    assert [("one.jsonl" in line, "two.jsonl" in line) for line in lines] == [(True, False), (False, True)]
    assert bench.manifest()["rows"] == {"read": 8, "accepted": 6, "rejected": 2, "left_out": 0}


def test_a_bad_row_leaves_everything_as_it_was(bench):
    bench.tokenize("--data", bench.jsonl(rows(0, 9), "one.jsonl"))
    manifest, files = bench.manifest(), sorted(os.listdir(bench.tokenized / "r"))
    outcome = bench.tokenize("--data", bench.jsonl([*rows(9, 3), {"x": 1}], "two.jsonl"), "--append")
    assert outcome.code == 2
    assert "two.jsonl line 4" in outcome.err
    assert (bench.manifest(), sorted(os.listdir(bench.tokenized / "r"))) == (manifest, files)


def test_validation_data_is_appended_too(bench):
    files = [bench.jsonl(rows(10 * number, 5), f"{number}.jsonl") for number in range(4)]
    bench.tokenize("--data", files[0], "--val", files[1])
    outcome = bench.tokenize("--data", files[2], "--val", files[3], "--append")
    assert outcome.code == 0, outcome.err
    assert [bench.manifest(name)["documents"] for name in ("r", "r-val")] == [10, 10]


def test_validation_data_may_come_later(bench):
    files = [bench.jsonl(rows(10 * number, 5), f"{number}.jsonl") for number in range(3)]
    bench.tokenize("--data", files[0])
    assert bench.tokenize("--data", files[1], "--val", files[2], "--append").code == 0
    assert [bench.manifest(name)["documents"] for name in ("r", "r-val")] == [10, 5]


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (None, (), "has no tokenised data to append to: leave out --append the first time"),
        (("--seq", "256"), (), "was made with --seq 256: append with the same, or use --retokenize"),
        (("--val", "2"), (), "was made with --val 2, drawn from all rows, so nothing can be appended"),
        ((), ("--val", "10%"), "--val 10% is drawn from all rows, so --append cannot add to it"),
        ((), ("--retokenize",), "--append keeps the shards and --retokenize rebuilds them: give one of them"),
        ((), ("--template", "megatron"), "was made with another template"),
    ],
)
def test_what_cannot_be_appended(bench, before, now, message):
    if before is not None:
        assert bench.tokenize("--data", bench.jsonl(rows(0, 9), "one.jsonl"), *before).code == 0
    outcome = bench.tokenize("--data", bench.jsonl(rows(9, 3), "two.jsonl"), "--append", *now)
    assert outcome.code == 2
    assert message in outcome.err


def test_no_data(bench):
    bench.tokenize("--data", bench.jsonl(rows(0, 9), "one.jsonl"))
    outcome = bench.tokenize("--append")
    assert outcome.code == 2
    assert "--append adds the rows of --data, and no --data was given" in outcome.err
