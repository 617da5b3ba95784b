"""Files to rows: a text is what the file says or the row is refused, whatever the kind of file, its name and its size."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import pair
from tests.unit.test_formats import texts
from tokenize_data import hub_data
from tokenize_data.errors import UserError
from tokenize_data.records import parse_line
from tokenize_data.rows import Unreadable, csv_rows, json_rows
from tokenize_data.sources import open_sources

TEXTS = st.text(
    st.characters(codec="utf-8", exclude_characters="\x00\ufeff") | st.sampled_from('",\t\r\n\\{}[] :7.\u2028'), max_size=6
)  # fmt: skip
VALUES = st.sampled_from(["007", "1.50", "2024-01-02", "NA", "None", "null", "nan", "true", "1e5", "+1", " x ", "", "[1]", '{"a": 1}'])
CELLS = TEXTS | VALUES
TABLES = st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8)


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def rows_of(*files: Any) -> list[dict[str, Any]]:
    """All rows, none of them bad."""
    found = []
    for source in open_sources([str(file) for file in files]):
        for chunk in source.chunks(0):
            assert not chunk.bad
            found += [parse_line(row) for _, row in chunk.rows() if isinstance(row, bytes)]
    return found


# ---- what a text is


@settings(max_examples=300, deadline=None, derandomize=True)
@given(table=TABLES, size=st.integers(1, 9), tsv=st.booleans(), quote_all=st.booleans(), end=st.sampled_from(["\n", "\r\n"]))
def test_csv_values_are_what_a_writer_wrote(table, size, tsv, quote_all, end):
    written = io.StringIO()
    quote_all = quote_all or any("\r" in cell for row in table for cell in row)  # which the csv module does not quote otherwise
    quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
    delimiter = "\t" if tsv else ","
    csv.writer(written, lineterminator=end, delimiter=delimiter, quoting=quoting).writerows([("prompt", "gold"), *table])
    data = written.getvalue().encode()
    assert [parse_line(row) for row in csv_rows("x", pieces(data, size), delimiter)] == [
        {"prompt": prompt, "gold": gold} for prompt, gold in table
    ]  # fmt: skip


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | CELLS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6,
)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    values=st.lists(JSON, max_size=5), size=st.integers(1, 9), indent=st.sampled_from([None, 1]), ascii_only=st.booleans(),
    is_list=st.booleans(),
)  # fmt: skip
def test_json_values_are_what_a_writer_wrote(values, size, indent, ascii_only, is_list):
    if is_list:
        text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    else:
        values = [{"row": value} for value in values]
        text = "\n".join(json.dumps(value, indent=indent, ensure_ascii=ascii_only) for value in values)
    found = list(json_rows("x", pieces(text.encode(), size)))
    assert [json.loads(row) for row in found] == values
    assert not any(b"\n" in row for row in found)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(table=st.lists(st.tuples(CELLS | st.none(), CELLS), min_size=1, max_size=8))
def test_a_table_in_every_kind_of_file_has_the_same_rows(tmp_path_factory, table):
    folder = tmp_path_factory.mktemp("kinds")
    rows = [{"prompt": prompt, "gold": gold} for prompt, gold in table]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "a.json").write_text(json.dumps(rows, indent=2))
    columns = pa.table({"prompt": pa.array([p for p, _ in table], pa.string()), "gold": pa.array([g for _, g in table], pa.string())})
    parquet.write_table(columns, folder / "a.parquet", row_group_size=3)
    for name, opened in (("file.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        with opened(folder / name, columns.schema) as writer:
            writer.write_table(columns)
    for name in ("a.jsonl", "a.json", "a.parquet", "file.arrow", "stream.arrow"):
        assert rows_of(folder / name) == rows, name


def test_numbers_and_dates_stay_what_they_were_after_many_texts(bench):
    """Type inference looked at the first ten thousand rows and took the rest for numbers."""
    answers = ["text"] * 12_000 + ["007", "1.50", "2024-01-02", "NA", "None", "null", "1e5", "true", "0x10"]
    for name in ("a.csv", "a.tsv"):
        separator = "\t" if name == "a.tsv" else ","
        bench.write(f"prompt{separator}gold\n" + "".join(f"q{separator}{answer}\n" for answer in answers), name)
        assert [row["gold"] for row in rows_of(bench.root / name)] == answers
    bench.write(json.dumps([pair("q", answer) for answer in answers]), "a.json")
    assert [row["gold"] for row in rows_of(bench.root / "a.json")] == answers
    for name in ("a.csv", "a.json"):
        content = (bench.root / name).read_bytes()
        few = bench.write(content.replace(b"q,text\n", b"").replace(b'{"prompt": "q", "gold": "text"}, ', b""), name)
        assert bench.tokenize("--data", few, run_name=name).code == 0
        assert [trained for _, trained in texts(bench, name)] == [f"{answer}<|im_end|>" for answer in answers[12_000:]]


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([datetime(2024, 1, 2)], pa.timestamp("us"), "an object ({'datetime': '2024-01-02 00:00:00'}), not text"),
        ([b"bytes"], pa.binary(), "an object ({'bytes': '5 bytes'}), not text"),
        ([Decimal("1.50")], pa.decimal128(5, 2), "an object ({'Decimal': '1.50'}), not text"),
        ([1.5], pa.float64(), "a number (1.5), not text"),
        ([float("nan")], pa.float64(), "an object ({'float': 'nan'}), not text"),
        ([7], pa.int64(), "a number (7), not text"),
        ([None], pa.string(), "is null"),
    ],
)
def test_parquet_values_that_are_no_texts_are_refused(bench, values, kind, message):
    file = bench.root / "a.parquet"
    parquet.write_table(pa.table({"prompt": ["q"] * len(values), "gold": pa.array(values, kind)}), file)
    outcome = bench.tokenize("--data", file)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert "a.parquet row 1" in outcome.err
    assert message in outcome.err


def test_columns_that_are_not_used_may_hold_anything(bench):
    file = bench.root / "a.parquet"
    parquet.write_table(pa.table({**{key: [value] for key, value in pair().items()}, "score": [float("nan")], "raw": [b"\xff"]}), file)
    assert bench.tokenize("--data", file).code == 0


def test_text_in_parquet_that_is_not_utf8_costs_its_row_alone(bench):
    good, bad = pa.array(["Yes.", "No."]), pa.array([b"Yes.", b"caf\xe9"]).view(pa.binary()).cast(pa.binary())
    broken = pa.StringArray.from_buffers(2, bad.buffers()[1], bad.buffers()[2])
    with pa.ipc.new_file(bench.root / "a.arrow", pa.schema({"prompt": pa.string(), "gold": pa.string()})) as writer:
        writer.write_batch(pa.record_batch([good, broken], names=["prompt", "gold"]))
    outcome = bench.tokenize("--data", bench.root / "a.arrow", "--max_bad_rows", "1")
    assert outcome.code == 0, outcome.err
    (rejected,) = map(json.loads, (bench.tokenized / "r" / "rejected.jsonl").read_text().splitlines())
    assert (rejected["row"], "cannot be read from its columns" in rejected["reason"]) == (2, True) or rejected["reason"]
    assert bench.manifest()["documents"] == 1


def test_parts_of_a_message_are_texts_too(bench):
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": 1.50}]}, {"role": "assistant", "content": "Yes."}]}
    outcome = bench.tokenize("--data", bench.jsonl([row]))
    assert outcome.code == 2
    assert "message 1: 'content' is a list" in outcome.err


BAD_CSV = {
    "one value too many": (b"q,a,b", "3 values, the header names 2"),
    "one value too few": (b"q", "1 values, the header names 2"),
    "text after a quote": (b'q,"a" b', "not valid CSV"),
    "not UTF-8": (b"q,caf\xe9", "not UTF-8: byte 0xe9"),
    "empty": (b"q,", "'gold' is empty"),
    "a second file's byte-order mark": (b"\xef\xbb\xbfprompt,gold", "a byte-order mark in the middle of the file"),
    "NUL": (b"q,a\x00", "NUL"),
    "a bare carriage return": (b"q,a\rq,b", "not valid CSV: new-line character seen in unquoted field"),
}


@pytest.mark.parametrize("name", BAD_CSV)
def test_a_bad_csv_row_is_refused_and_the_next_one_read(bench, name):
    bad, message = BAD_CSV[name]
    data = bench.write(b"\n".join([b"prompt,gold", b"q,one", bad, b'"q\n",two', b""]), "a.csv")
    outcome = bench.tokenize("--data", data)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert "a.csv row 2: " in outcome.err
    assert message in outcome.err
    assert bench.tokenize("--data", data, "--max_bad_rows", "1").code == 0
    assert [trained for _, trained in texts(bench)] == ["one<|im_end|>", "two<|im_end|>"]
    (rejected,) = map(json.loads, (bench.tokenized / "r" / "rejected.jsonl").read_text().splitlines())
    assert rejected["row"] == bad.removeprefix(b"\xef\xbb\xbf").decode(errors="backslashreplace") or "gold" in rejected["row"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'prompt,gold\nq,"a\nb\nc', "row 1: a quote is opened and never closed"),
        ("a.csv", "prompt,prompt\nq,a\n", "the header names 'prompt' twice"),
        ("a.csv", 'prompt,"go"ld\nq,a\n', "the header is not valid CSV"),
        ("a.csv", "prompt,gold\n", "has no rows"),
        ("a.json", "[]", "has no rows"),
        ("a.json", "[1, 2", "row 2: no ',' or ']' after it"),
        ("a.json", '[{"a": 1} {"a": 2}]', "row 1: no ',' or ']' after it"),
        ("a.json", '[{"a": 1}, ]', "row 2: a value is missing"),
        ("a.json", '[{"a": 1}] 5', "something follows the list's ']'"),
        ("a.json", "[" * 100_000, "row 1: it has no end"),
        ("a.json", '{"a": {"b": "c"', "cannot be read as JSON: row 1"),
        ("a.arrow", "ARROW1 no", "cannot be read as arrow"),
        ("a.parquet.gz", "x", "is a compressed parquet file: decompress it first"),
    ],
)
def test_files_that_cannot_be_read(bench, name, content, message):
    outcome = bench.tokenize("--data", bench.write(content, name), "--max_bad_rows", "9")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert f"{name}" in outcome.err
    assert message in outcome.err


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.binary(max_size=60) | st.text('",\n\r[]{}: 1a', max_size=60).map(str.encode), size=st.integers(1, 9))
def test_any_bytes_give_rows_or_one_line(data, size):
    readers: list[Callable[[], Iterator[Any]]] = [
        lambda: csv_rows("x", pieces(data, size), ","), lambda: json_rows("x", pieces(data, size)),
    ]  # fmt: skip
    for read in readers:
        try:
            assert all(isinstance(row, Unreadable) or b"\n" not in row for row in read())
        except UserError:
            continue  # anything else is a traceback


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
    assert "other ones than the shards were made of, in the same 18 bytes" in outcome.err
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
    command += ["--tokenized_data_dir", bench.tokenized, "--data", *(bench.root / f"a.{kind}" for kind in ("json", "csv", "parquet"))]
    subprocess.run([str(part) for part in command], check=True, cwd=elsewhere)
    assert [file for file in elsewhere.rglob("*") if file.is_file()] == []


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
        (("data/train-00001-of-00002.jsonl", "data/train-00000-of-00002.jsonl", "data/test-0.jsonl"),
         ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]),
        (("dev.jsonl",), ["dev.jsonl"]),
        (("a.jsonl", "config.json", "README.md", ".hidden.jsonl"), ["a.jsonl"]),
        (("trains.jsonl", "testimony.jsonl"), ["testimony.jsonl", "trains.jsonl"]),
        (("x[1]/a.jsonl",), ["x[1]/a.jsonl"]),
        (("test.jsonl", "dev.jsonl"), "has files of test, validation, and none of a split 'train'"),
        (("test.jsonl", "a.jsonl"), "has files of others, test, and none of a split 'train'"),
        (("a.jsonl", "a.csv"), "has files of several kinds (csv, jsonl)"),
        (("README.md",), "is a directory without data files"),
    ],
)  # fmt: skip
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


# ---- sizes


def run_with(megabytes: int, bench: Any, data: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The command with so much memory to have, beyond what it maps when it has read one row."""
    script = (
        "import resource, sys; from tokenize_data import build, cli, stage; import pyarrow.parquet, zstandard; "
        "resident = int(open('/proc/self/statm').read().split()[0]) * 4096; "
        f"resource.setrlimit(resource.RLIMIT_DATA, (resident + ({megabytes} << 20),) * 2); sys.exit(cli.entry(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "--run_name", "r", "--tokenized_data_dir", bench.tokenized, "--checkpoint", bench.base]
    command += ["--data", data, "--workers", "1", *flags]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def compressed(kind: str, piece: bytes, count: int, before: bytes = b"", after: bytes = b"") -> bytes:
    if kind == "gz":
        written = io.BytesIO()
        with gzip.GzipFile(fileobj=written, mode="wb", compresslevel=1) as file:
            for part in (before, *(piece for _ in range(count)), after):
                file.write(part)
        return written.getvalue()
    packer = zstandard.ZstdCompressor().compressobj()
    return b"".join(packer.compress(part) for part in (before, *(piece for _ in range(count)), after)) + packer.flush()


ENORMOUS = {
    "a line": ("a.jsonl", b"x" * (1 << 20), b"", b"\n", "bytes long, more than 16,777,216"),
    "white space": ("a.jsonl", b" " * (1 << 20), b"", b"\n", "no row can be used|bytes long, more than 16,777,216"),
    "a JSON text": ("a.json", b"x" * (1 << 20), b'[{"prompt": "', b'"}]', "row 1: more than 16,777,216 characters long"),
    "a JSON list of lists": ("a.json", b"[0]," * (1 << 18), b"[[", b"]]", "row 1: more than 16,777,216 characters long"),
    "a line of lists": ("a.jsonl", b"[0]," * (1 << 18), b"[", b"]\n", "bytes long, more than 16,777,216"),
    "a quoted value": ("a.csv", b"x\n" * (1 << 19), b'prompt,gold\nq,"', b'"\n', "row 1: more than 16,777,216 bytes long"),
    "a line of cells": ("a.csv", b"x," * (1 << 19), b"prompt,gold\n", b"\n", "row 1: more than 16,777,216 bytes long"),
    "a header": ("a.csv", b"x" * (1 << 20), b"", b"\n", "row 1: more than 16,777,216 bytes long"),
}


@pytest.mark.parametrize("packing", ["zst", "gz"])
@pytest.mark.parametrize("what", ENORMOUS)
def test_enormous_rows_in_small_files_take_little_memory(bench, what, packing):
    """Each is 300 MB when decompressed, in a file of a few kilobytes."""
    name, piece, before, after, message = ENORMOUS[what]
    data = bench.write(compressed(packing, piece, 300, before, after), f"{name}.{packing}")
    assert data.stat().st_size < 4 << 20
    done = run_with(250, bench, data)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr[-2000:]
    assert any(part in done.stderr for part in message.split("|")), done.stderr


def test_a_row_of_many_values_takes_little_memory(bench):
    """15 MB, which Python's own objects would need half a GB for."""
    good, bad = json.dumps(pair()), f'{{"prompt": [{"[0]," * 3_900_000}[0]], "gold": "a"}}'
    done = run_with(250, bench, bench.write(f"[{good},\n{bad}]", "a.json"), "--max_bad_rows", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    (rejected,) = map(json.loads, (bench.tokenized / "r" / "rejected.jsonl").read_text().splitlines())
    assert rejected["reason"] == "more than 500,000 values: a row is one flat object"


def test_a_malformed_row_of_a_json_list_costs_itself_alone(bench):
    good = json.dumps(pair())
    assert bench.tokenize("--data", bench.write(f'[{good}, {{"prompt": x}}, 5, {good}]', "a.json"), "--max_bad_rows", "2").code == 0
    assert bench.manifest()["rows"] == {"read": 4, "accepted": 2, "rejected": 2, "left_out": 0}


def test_a_json_list_of_many_rows_is_read_in_pieces(bench):
    """60 MB of one list."""
    row = json.dumps(pair("q" * 1000, "a" * 23_000)).encode()
    data = bench.write(compressed("zst", row + b", ", 2500, b"[", row + b"]"), "a.json.zst")
    done = run_with(250, bench, data, "--seq", "16", "--max_bad_rows", "2501")
    assert done.returncode == 2
    assert "2,501 rows read = 0 accepted + 2,501 rejected" in done.stderr


# ---- names and byte-order marks


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json"])
def test_a_name_that_is_not_utf8(bench, suffix):
    file = os.fsencode(bench.root) + b"/caf\xe9" + suffix.encode()
    content = {".jsonl": json.dumps(pair()) + "\nx\n", ".csv": "prompt,gold\nIs it?,Yes.\nx\n", ".json": json.dumps([pair(), 5])}
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
