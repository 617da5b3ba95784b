"""Rows of every kind of file: a text is what the file says, or the row is refused."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import pair
from tests.unit.test_formats import texts
from tests.unit.test_sources import rows_of
from tokenize_data.errors import UserError
from tokenize_data.json_lines import parse_line
from tokenize_data.rows import Unreadable, csv_rows, json_rows

TEXTS = st.text(
    st.characters(codec="utf-8", exclude_characters="\x00\ufeff") | st.sampled_from('",\t\r\n\\{}[] :7.\u2028'),
    max_size=6,
)
VALUES = st.sampled_from(
    ["007", "1.50", "2024-01-02", "NA", "None", "null", "nan", "true", "1e5", "+1", " x ", "", "[1]", '{"a": 1}']
)
CELLS = TEXTS | VALUES
TABLES = st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8)


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    table=TABLES,
    size=st.integers(1, 9),
    tsv=st.booleans(),
    quote_all=st.booleans(),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_csv_values_are_what_a_writer_wrote(table, size, tsv, quote_all, end):
    written = io.StringIO()
    quote_all = quote_all or any(
        "\r" in cell for row in table for cell in row
    )  # which the csv module does not quote otherwise
    quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
    delimiter = "\t" if tsv else ","
    csv.writer(written, lineterminator=end, delimiter=delimiter, quoting=quoting).writerows(
        [("prompt", "gold"), *table]
    )
    data = written.getvalue().encode()
    assert [parse_line(row) for row in csv_rows("x", pieces(data, size), delimiter)] == [
        {"prompt": prompt, "gold": gold} for prompt, gold in table
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | CELLS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    values=st.lists(JSON, max_size=5),
    size=st.integers(1, 9),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    is_list=st.booleans(),
)
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
    columns = pa.table(
        {"prompt": pa.array([p for p, _ in table], pa.string()), "gold": pa.array([g for _, g in table], pa.string())}
    )
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
    parquet.write_table(
        pa.table({**{key: [value] for key, value in pair().items()}, "score": [float("nan")], "raw": [b"\xff"]}), file
    )
    assert bench.tokenize("--data", file).code == 0


def test_text_in_parquet_that_is_not_utf8_costs_its_row_alone(bench):
    good, bad = pa.array(["Yes.", "No."]), pa.array([b"Yes.", b"caf\xe9"], pa.binary())
    broken = pa.StringArray.from_buffers(2, bad.buffers()[1], bad.buffers()[2])
    with pa.ipc.new_file(bench.root / "a.arrow", pa.schema({"prompt": pa.string(), "gold": pa.string()})) as writer:
        writer.write_batch(pa.record_batch([good, broken], names=["prompt", "gold"]))
    outcome = bench.tokenize("--data", bench.root / "a.arrow", "--max_bad_rows", "1")
    assert outcome.code == 0, outcome.err
    (rejected,) = map(json.loads, (bench.tokenized / "r" / "rejected.jsonl").read_text().splitlines())
    assert "cannot be read from its columns ('utf-8' codec can't decode byte 0xe9" in rejected["reason"]
    assert bench.manifest()["documents"] == 1


def test_parts_of_a_message_are_texts_too(bench):
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": 1.50}]},
            {"role": "assistant", "content": "Yes."},
        ]
    }
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
    assert rejected["reason"].startswith(message) or message in rejected["reason"]
    if rejected["row"][0] != "{":  # of one that was read, the row as JSON
        assert rejected["row"].encode() == bad


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
        lambda: csv_rows("x", pieces(data, size), ","),
        lambda: json_rows("x", pieces(data, size)),
    ]
    for read in readers:
        try:
            assert all(isinstance(row, Unreadable) or b"\n" not in row for row in read())
        except UserError:
            continue  # anything else is a traceback
