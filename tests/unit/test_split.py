"""Validation rows that are drawn from the training data, and never trained."""

from __future__ import annotations

import pytest

from tests.conftest import pair

ROWS = [pair(f"Is {number}?", f"It is {number}.") | {"patient": number // 4} for number in range(200)]


def lines(bench, run_name="r"):
    return [document["line"] for document in bench.documents(run_name)]


def tokenized(bench, *flags, rows=ROWS, run_name="r"):
    outcome = bench.tokenize("--data", bench.jsonl(rows), *flags, run_name=run_name)
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.mark.parametrize(("share", "count"), [("5%", 10), ("12.5%", 25), ("30", 30), ("0.1%", 1)])
def test_a_share_or_a_number_of_rows(bench, share, count):
    outcome = tokenized(bench, "--val", share)
    train, val = lines(bench), lines(bench, "r-val")
    assert len(val) == count
    assert sorted([*train, *val]) == list(range(1, 201))
    assert f"{200 - count} rows read = {200 - count} accepted + 0 rejected; {count} more left out" in outcome.out
    assert bench.manifest("r-val")["split"] == {"val": share, "seed": 1234, "group": None, "is_validation": True}


def test_rows_are_spread_and_follow_the_seed(bench):
    tokenized(bench, "--val", "50", "--seed", "1")
    tokenized(bench, "--val", "50", "--seed", "1", "--workers", "2", run_name="again")
    tokenized(bench, "--val", "50", "--seed", "2", run_name="other")
    val = lines(bench, "r-val")
    assert lines(bench, "again-val") == val != lines(bench, "other-val")
    assert all(
        sum(line <= end for line in val) - sum(line <= end - 50 for line in val) >= 5 for end in (50, 100, 150, 200)
    )


@pytest.mark.parametrize("workers", ["1", "2"])
def test_rows_of_a_group_stay_together(bench, workers):
    tokenized(bench, "--val", "10%", "--val_group", "patient", "--workers", workers)
    train, val = ({(line - 1) // 4 for line in lines(bench, name)} for name in ("r", "r-val"))
    assert not train & val
    assert len(lines(bench, "r-val")) == 20


def test_shares_of_several_data_sets_and_samples(bench):
    """Samples and weights are of what is left to train; validation counts each row once."""
    first, second = bench.jsonl(ROWS, "a.jsonl"), bench.jsonl(ROWS[:100], "b.jsonl")
    bench.write(f"datasets:\n  - {{files: [{first}], samples: 50}}\n  - {{files: [{second}], weight: 2}}\n", "mix.yaml")
    outcome = bench.tokenize("--config", bench.root / "mix.yaml", "--val", "10%")
    assert outcome.code == 0, outcome.err
    places = {name: [(d["file"], d["line"]) for d in bench.documents(name)] for name in ("r", "r-val")}
    assert len(places["r-val"]) == len(set(places["r-val"])) == 30
    assert not set(places["r"]) & set(places["r-val"])
    kept = sum(file.endswith("b.jsonl") for file, _ in places["r-val"])
    assert len(places["r"]) == 50 + 2 * (100 - kept)


def test_it_stays_for_later_runs_of_this_name(bench):
    tokenized(bench, "--val", "10%")
    val = lines(bench, "r-val")
    tokenized(bench, "--val", "10%", "--seed", "7")
    again = bench.tokenize("--val", "10%")
    assert again.code == 0, again.err
    assert again.err == ""
    assert lines(bench, "r-val") == val


def test_a_validation_set_that_is_lost_is_drawn_as_before(bench):
    tokenized(bench, "--val", "10%")
    val = lines(bench, "r-val")
    (bench.tokenized / "r-val" / "manifest.json").unlink()
    tokenized(bench, "--val", "10%", "--seed", "7")
    assert lines(bench, "r-val") == val


def test_shards_without_this_split_are_refused(bench):
    tokenized(bench)
    outcome = bench.tokenize("--data", bench.root / "data.jsonl", "--val", "5%")
    assert outcome.code == 2
    assert "/r was made without a split, so rows for --val 5% may have been trained: use --retokenize" in outcome.err
    tokenized(bench, "--val", "10%", "--val_group", "patient", "--retokenize")
    outcome = bench.tokenize("--val", "5%")
    assert "/r was made with --val 10% --val_group patient, so rows for --val 5% may have been trained" in outcome.err
    tokenized(bench, "--val", "5%", "--retokenize")


def test_changed_files_cannot_bring_trained_rows_back(bench):
    tokenized(bench, "--val", "10%")
    (bench.tokenized / "r-val" / "manifest.json").unlink()
    outcome = bench.tokenize("--data", bench.jsonl(ROWS[1:]), "--val", "10%")
    assert outcome.code == 2
    assert (
        "data.jsonl is not what the training data were made from, so rows for validation may have been" in outcome.err
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--val", "0%"], "--val 0%: give a share between 0% and 100%, or a number of rows"),
        (["--val", "100%"], "--val 100%: give a share between 0% and 100%"),
        (["--val", "200"], "--val 200 of 200 rows leaves nothing to train: ask for less"),
        (["--val", "5%", "val.jsonl"], "--val 5% val.jsonl: give files, or one share such as 5% or 500"),
        (["--val_group", "patient"], "--val_group keeps rows together in a split of --data: give --val a share"),
        (
            ["--val", "5%", "--val_group", "case"],
            "data.jsonl line 1: no key 'case'; the row has 'prompt', 'gold', 'patient', 'same': name the right one",
        ),
        (["--val", "5%", "--val_group", "same"], "all 200 rows have the same 'same': group them by another key"),
    ],
)
def test_what_cannot_be_split(bench, flags, message):
    rows = [{**row, "same": 1} for row in ROWS]
    outcome = bench.tokenize("--data", bench.jsonl(rows), *flags)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert message in outcome.err
