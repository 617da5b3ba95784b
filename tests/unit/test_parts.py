"""`tokenize_data --part i/N`: what several machines make is what one makes, byte for byte."""

from __future__ import annotations

import random

import pytest

from tests.conftest import pair
from tokenize_data import sources, streams


@pytest.fixture
def small_chunks(monkeypatch):
    """So that small files have many chunks."""
    monkeypatch.setattr(streams, "CHUNK_BYTES", 700)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 700)


def rows(count, seed=0):
    draw = random.Random(seed)
    return [
        pair(f"Question {n} {'é' * draw.randint(0, 40)}?", f"Answer {n}. " * draw.randint(1, 4)) for n in range(count)
    ]


def shards(bench, run_name):
    manifest = bench.manifest(run_name)
    named = [*manifest["shards"], manifest["index"]]
    return [(bench.tokenized / run_name / info["file"]).read_bytes() for info in named]


KEPT = (
    "documents",
    "tokens",
    "trained_tokens",
    "rows",
    "role_tokens",
    "rejected_reasons",
    "num_cut",
    "num_open",
    "split",
)


def same(bench, one, other):
    assert shards(bench, one) == shards(bench, other)
    made, expected = bench.manifest(one), bench.manifest(other)
    for key in KEPT:
        assert made[key] == expected[key], key
    assert made["datasets"] == expected["datasets"]


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_the_same_bytes_as_on_one_machine(bench, small_chunks, order):
    files = [bench.jsonl(rows(150), "one.jsonl"), bench.jsonl([*rows(90, 1), {"x": 1}], "two.jsonl")]
    flags = ("--data", *files, "--max_bad_rows", "2")
    assert bench.tokenize(*flags, run_name="whole").code == 0
    for place, part in enumerate(order, 1):
        outcome = bench.tokenize(*flags, "--part", f"{part}/3")
        assert outcome.code == 0, outcome.err
        if place < 3:
            missing = ", ".join(map(str, sorted(order[place:])))
            assert f"part {part} of 3 is written; missing: {missing}. The last one joins them" in outcome.out
            assert not (bench.tokenized / "r" / "manifest.json").exists()
    assert "joining 3 parts" in outcome.out
    assert "240 documents" in outcome.out
    same(bench, "r", "whole")
    assert (bench.tokenized / "r" / "rejected.jsonl").read_text() == (
        bench.tokenized / "whole" / "rejected.jsonl"
    ).read_text()
    assert not (bench.tokenized / ".r.parts").exists()


def test_more_parts_than_chunks(bench):
    file = bench.jsonl(rows(5))
    bench.tokenize("--data", file, run_name="whole")
    for part in range(1, 5):
        assert bench.tokenize("--data", file, "--part", f"{part}/4").code == 0
    same(bench, "r", "whole")


def test_with_a_validation_split(bench, small_chunks):
    flags = ("--data", bench.jsonl(rows(120)), "--val", "10%")
    bench.tokenize(*flags, run_name="whole")
    for part in (2, 1):
        outcome = bench.tokenize(*flags, "--part", f"{part}/2")
        assert outcome.code == 0, outcome.err
    same(bench, "r", "whole")
    same(bench, "r-val", "whole-val")


def test_a_part_is_made_once(bench, small_chunks):
    flags = ("--data", bench.jsonl(rows(60)))
    bench.tokenize(*flags, "--part", "1/2")
    assert "part 1 of 2 exists already" in bench.tokenize(*flags, "--part", "1/2").out
    bench.tokenize(*flags, "--part", "2/2")
    assert "using" in bench.tokenize(*flags, "--part", "1/2").out


def test_parts_of_other_files_are_not_mixed_in(bench, small_chunks):
    bench.tokenize("--data", bench.jsonl(rows(60)), "--part", "1/2")
    file = bench.jsonl(rows(61, 3))
    bench.tokenize("--data", file, run_name="whole")
    assert "missing: 1" in bench.tokenize("--data", file, "--part", "2/2").out
    assert "joining" in bench.tokenize("--data", file, "--part", "1/2").out
    same(bench, "r", "whole")


def test_a_damaged_part(bench, small_chunks):
    flags = ("--data", bench.jsonl(rows(60)))
    bench.tokenize(*flags, "--part", "1/2")
    (part,) = (bench.tokenized / ".r.parts").glob("*/1-of-2.arrow")
    part.write_bytes(part.read_bytes()[:-200])
    outcome = bench.tokenize(*flags, "--part", "2/2")
    assert outcome.code == 2
    assert f"{part} is damaged" in outcome.err
    assert not (bench.tokenized / "r" / "manifest.json").exists()


def test_bad_rows_stop_the_machine_that_has_them(bench, small_chunks):
    flags = ("--data", bench.jsonl([{"x": 1}, *rows(60)]))
    outcome = bench.tokenize(*flags, "--part", "1/2")
    assert outcome.code == 2
    assert "data.jsonl line 1" in outcome.err
    assert list((bench.tokenized / ".r.parts").glob("*/*")) == []


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "a/b", "1/0"])
def test_what_is_no_part(bench, text):
    outcome = bench.tokenize("--data", bench.jsonl(rows(3)), "--part", text)
    assert outcome.code == 2
    assert f"--part {text}: write i/N, such as 3/8 for the third of eight" in outcome.err


def test_shortened_questions_are_counted(bench, small_chunks):
    data = [pair("word " * 300 + str(number), f"Answer {number}.") for number in range(12)]
    flags = ("--data", bench.jsonl(data), "--seq", "128", "--truncate", "question")
    bench.tokenize(*flags, run_name="whole")
    for part in (1, 2):
        outcome = bench.tokenize(*flags, "--part", f"{part}/2")
        assert outcome.code == 0, outcome.err
    same(bench, "r", "whole")
    assert bench.manifest()["num_shortened"] == 12
