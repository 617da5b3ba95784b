"""Which files a name stands for, names that are not UTF-8, and files that change."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from tests.conftest import pair
from tests.unit.test_formats import texts
from tokenize_data import hub_data
from tokenize_data.errors import UserError
from tokenize_data.json_lines import parse_line
from tokenize_data.sources import open_sources


def rows_of(*files: Any) -> list[dict[str, Any]]:
    """All rows, none of them bad."""
    found = []
    for source in open_sources([str(file) for file in files]):
        for chunk in source.chunks(0):
            assert not chunk.bad
            found += [parse_line(row) for _, row in chunk.rows() if isinstance(row, bytes)]
    return found


# ---- which file


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".tsv", ".parquet"])
def test_a_name_is_no_pattern(bench, suffix):
    """Beside each file lies the one that its name would match as a pattern."""
    for name, other in (("data[1]", "data1"), ("we*ird", "wexird"), ("what?", "whatX"), ("a{b,c}", "ab")):
        for stem, answer in ((name, "right"), (other, "wrong")):
            rows = [pair("q", answer)]
            file = bench.root / f"{stem}{suffix}"
            if suffix == ".parquet":
                parquet.write_table(pa.Table.from_pylist(rows), file)
            elif suffix in (".csv", ".tsv"):
                file.write_text(f"prompt,gold\nq,{answer}\n".replace(",", "," if suffix == ".csv" else "\t"))
            else:
                file.write_text(json.dumps(rows if suffix == ".json" else rows[0]))
        assert [row["gold"] for row in rows_of(bench.root / f"{name}{suffix}")] == ["right"]


def test_a_file_rewritten_with_its_size_and_time_is_read_again(bench, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    data = bench.write("prompt,gold\nq,one\n", "a.csv")
    times = data.stat()
    assert bench.tokenize("--data", data).code == 0
    data.write_text("prompt,gold\nq,two\n")
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
    outcome = bench.tokenize("--data", data)
    assert "not those the shards were made of, though 18 bytes as before" in outcome.err
    assert bench.tokenize("--data", data, "--retokenize").code == 0
    assert texts(bench)[0][1] == "two<|im_end|>"
    assert bench.tokenize("--data", data).err == ""


def test_rows_are_not_copied_outside_the_chosen_folders(bench, monkeypatch, tmp_path):
    """Whatever a library may cache lies below these."""
    elsewhere = tmp_path / "home"
    elsewhere.mkdir()
    for name in ("HOME", "HF_HOME", "TMPDIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(elsewhere))
    bench.write('[{"prompt": "secret", "gold": "secret"}]', "a.json")
    bench.write("prompt,gold\nsecret,secret\n", "a.csv")
    parquet.write_table(pa.Table.from_pylist([pair("secret", "secret")]), bench.root / "a.parquet")
    command = [sys.executable, "-m", "tokenize_data", "--run_name", "r", "--checkpoint", bench.base]
    command += [
        "--tokenized_data_dir",
        bench.tokenized,
        "--data",
        *(bench.root / f"a.{kind}" for kind in ("json", "csv", "parquet")),
    ]
    subprocess.run([str(part) for part in command], check=True, cwd=elsewhere)
    left = [file for file in elsewhere.rglob("*") if file.is_file()]
    assert [
        file for file in left if file.parent.name != "tried" or file.read_bytes()
    ] == []  # that a tokenizer was tried is an empty file


def test_the_checksum_in_the_manifest_is_that_of_the_file(bench):
    rows = [pair("q", f"answer {n}") for n in range(300)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    parquet.write_table(pa.Table.from_pylist(rows), bench.root / "a.parquet")
    files = [
        bench.write(lines, "a.jsonl"),
        bench.write(gzip.compress(lines.encode()), "a.jsonl.gz"),
        bench.write(json.dumps(rows), "a.json"),
        bench.write("prompt,gold\n" + "".join(f"q,answer {n}\n" for n in range(300)), "a.csv"),
        bench.root / "a.parquet",
    ]
    for workers in (1, 3):
        assert bench.tokenize("--data", *files, "--workers", workers, "--retokenize").code == 0
        made = bench.manifest()["datasets"][0]["files"]
        assert [file["sha256"] for file in made] == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        assert [(file["size"], file["rows"]) for file in made] == [(file.stat().st_size, 300) for file in files]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_file_that_changes_while_it_is_read(bench, name):
    row = {"a.jsonl": json.dumps(pair()) + "\n", "a.csv": "q,a\n"}[name]
    file = bench.write(("prompt,gold\n" if name == "a.csv" else "") + row * 500_000, name)
    (source,) = open_sources([str(file)])
    chunks = source.chunks(0)
    next(chunks)
    with file.open("a") as more:
        more.write(row)
    with pytest.raises(UserError, match="was changed while it was read"):
        list(chunks)


def test_a_changed_csv_is_noticed(bench):
    data = bench.write("prompt,gold\nq,one\n", "a.csv")
    bench.tokenize("--data", data)
    bench.write("prompt,gold\nq,other\n", "a.csv")
    assert "contents of" in bench.tokenize("--data", data).err


# ---- folders and the Hub


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("b.jsonl", "a.jsonl"), ["a.jsonl", "b.jsonl"]),
        (("train.jsonl", "test.jsonl", "validation.jsonl"), ["train.jsonl"]),
        (
            ("data/train-00001-of-00002.jsonl", "data/train-00000-of-00002.jsonl", "data/test-0.jsonl"),
            ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
        ),
        (("dev.jsonl",), ["dev.jsonl"]),
        (("a.jsonl", "config.json", "README.md", ".hidden.jsonl"), ["a.jsonl"]),
        (("trains.jsonl", "testimony.jsonl"), ["testimony.jsonl", "trains.jsonl"]),
        (("x[1]/a.jsonl",), ["x[1]/a.jsonl"]),
        (("test.jsonl", "dev.jsonl"), "has files of test, validation, and none of a split 'train'"),
        (("test.jsonl", "a.jsonl"), "has files of others, test, and none of a split 'train'"),
        (("a.jsonl", "a.csv"), "has files of several kinds (csv, jsonl)"),
        (("README.md",), "is a directory without data files"),
    ],
)
def test_files_of_a_folder(tmp_path, files, expected):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    if isinstance(expected, str):
        with pytest.raises(UserError) as caught:
            open_sources([str(tmp_path)])
        assert expected in str(caught.value)
    else:
        assert [source.name for source in open_sources([str(tmp_path)])] == [str(tmp_path / name) for name in expected]


def test_a_new_file_in_a_folder_is_noticed(bench):
    folder = bench.root / "folder"
    folder.mkdir()
    bench.jsonl([pair()], "folder/a.jsonl")
    bench.tokenize("--data", folder)
    assert bench.tokenize("--data", folder).err == ""
    bench.jsonl([pair()], "folder/b.jsonl")
    assert "b.jsonl: was not there" in bench.tokenize("--data", folder).err


def test_folders_that_save_to_disk_wrote(bench):
    from datasets import Dataset, DatasetDict

    one, two = (Dataset.from_list([pair("q", f"{word} {n}") for n in range(300)]) for word in ("train", "test"))
    DatasetDict({"test": two, "train": one}).save_to_disk(str(bench.root / "both"))
    DatasetDict({"test": two, "dev": one}).save_to_disk(str(bench.root / "neither"))
    one.shuffle(seed=0).save_to_disk(str(bench.root / "shuffled"), num_shards=2)
    assert [row["gold"] for row in rows_of(bench.root / "both")] == [f"train {n}" for n in range(300)]
    assert rows_of(bench.root / "shuffled") == list(one.shuffle(seed=0))
    outcome = bench.tokenize("--data", bench.root / "neither")
    assert f"has the splits test, dev: give the folder of one, such as {bench.root / 'neither' / 'test'}" in outcome.err
    assert len(rows_of(bench.root / "neither" / "test")) == 300


def test_a_data_set_on_the_hub_is_read_from_its_files(bench, monkeypatch):
    """Its names are resolved by `datasets`, whose network is replaced here; nothing is read by it."""
    file = bench.write("prompt,gold\nq,007\n", "fetched.csv")
    splits = {"train": ["hf://x/train.csv"], "test": ["hf://x/test.csv"]}
    monkeypatch.setattr(hub_data, "_splits", lambda repository, configuration: splits)
    monkeypatch.setattr(hub_data, "_fetch", lambda url: hub_data.HubFile(f"owner/name/{url[7:]}", file))
    assert bench.tokenize("--data", "owner/name").code == 0
    assert texts(bench)[0][1] == "007<|im_end|>"
    assert bench.documents()[0]["file"] == "owner/name/train.csv"
    assert bench.tokenize("--data", "owner/name").err == ""
    assert "no split 'dev': it has train, test" in bench.tokenize("--data", "owner/name:dev", "--retokenize").err
    del splits["train"]
    splits["dev"] = []
    assert "name one as owner/name:SPLIT" in bench.tokenize("--data", "owner/name", "--retokenize").err


def test_a_data_set_that_was_fetched_before_is_read_offline(bench, monkeypatch):
    folder = bench.root / "snapshot"
    folder.mkdir()
    bench.jsonl([pair()], "snapshot/train.jsonl")
    bench.jsonl([pair()], "snapshot/test.jsonl")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repository, **options: str(folder))
    assert bench.tokenize("--data", "owner/name").code == 0
    assert bench.documents()[0]["file"] == "owner/name/train.jsonl"
    outcome = bench.tokenize("--data", "owner/name:test", "--retokenize")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert f"splits are known to the Hub alone: give files of {folder}" in outcome.err


def test_a_name_that_the_hub_does_not_have_is_one_line(bench, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    outcome = bench.tokenize("--data", "no/such-data")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert "no/such-data is not a file here, and cannot be read from the Hub" in outcome.err


# ---- names and byte-order marks


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json"])
def test_a_name_that_is_not_utf8(bench, suffix):
    file = os.fsencode(bench.root) + b"/caf\xe9" + suffix.encode()
    content = {
        ".jsonl": json.dumps(pair()) + "\nx\n",
        ".csv": "prompt,gold\nIs it?,Yes.\nx\n",
        ".json": json.dumps([pair(), 5]),
    }
    with open(file, "wb") as written:
        written.write(content[suffix].encode())
    name = os.fsdecode(file)
    outcome = bench.tokenize("--data", name)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert "caf\\udce9" in outcome.err
    outcome = bench.tokenize("--data", name, "--max_bad_rows", "1")
    assert outcome.code == 0, outcome.err
    assert "caf\\udce9" in outcome.out
    assert bench.manifest()["datasets"][0]["files"][0]["name"] == name
    (rejected,) = map(json.loads, (bench.tokenized / "r" / "rejected.jsonl").read_bytes().splitlines())
    assert rejected["file"] == name
    assert bench.documents()[0]["file"] == name
    assert bench.inspect().code == 0
    assert bench.tokenize("--data", name, "--max_bad_rows", "1").err == ""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_before_any_line(bench, end):
    """As where files were joined, one of them empty."""
    lines = [f"\ufeff{json.dumps(pair('q', f'answer {n}'))}" for n in range(3)]
    outcome = bench.tokenize("--data", bench.write(end.join([*lines, "\ufeff"])))
    assert outcome.code == 0, outcome.err
    assert [trained for _, trained in texts(bench)] == [f"answer {n}<|im_end|>" for n in range(3)]
