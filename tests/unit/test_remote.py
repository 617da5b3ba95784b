"""Data in an object store and behind HTTP: the same shards as from local files, read in pieces, stored nowhere."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from huggingface_hub import HfFileSystem, constants

from tests import fake_store
from tests.conftest import pair
from tokenize_data import remote
from tokenize_data.streams import CHUNK_BYTES


@pytest.fixture(scope="module")
def _running() -> Iterator[fake_store.Store]:
    with fake_store.running() as store:
        yield store


GOOGLE, HUB = "gs://data/", "hf://datasets/data/set/"


@pytest.fixture
def store(_running: fake_store.Store, monkeypatch: pytest.MonkeyPatch) -> fake_store.Store:
    _running.objects.clear()
    _running.asked.clear()
    _running.change_after = None
    for name, value in {
        "AWS_ENDPOINT_URL": _running.address,
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", _running.address)
    monkeypatch.setattr(constants, "ENDPOINT", _running.address)
    template = f"{_running.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    HfFileSystem.clear_instance_cache()
    return _running


def lines(first, count):
    rows = [pair(f"Question {number}?", f"Answer {number}.") for number in range(first, first + count)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def shards(bench, run_name):
    manifest = bench.manifest(run_name)
    return [
        (bench.tokenized / run_name / info["file"]).read_bytes() for info in [*manifest["shards"], manifest["index"]]
    ]


def same_as_local(bench, content, name, *urls):
    local = bench.root / name
    local.write_bytes(content)
    assert bench.tokenize("--data", local, run_name="local").code == 0
    outcome = bench.tokenize("--data", *urls)
    assert outcome.code == 0, outcome.err
    assert shards(bench, "r") == shards(bench, "local")
    return bench.manifest()["datasets"][0]["files"]


def test_an_object(bench, store):
    store.objects["data/train.jsonl"] = lines(0, 300)
    (file,) = same_as_local(bench, lines(0, 300), "train.jsonl", "s3://data/train.jsonl")
    assert (file["name"], file["rows"]) == ("s3://data/train.jsonl", 300)
    again = bench.tokenize("--data", "s3://data/train.jsonl")
    assert again.code == 0
    assert "warning" not in again.err


@pytest.mark.parametrize("url", ["s3://data/parts/*.jsonl", "s3://data/parts"])
def test_a_pattern_and_a_folder(bench, store, url):
    store.objects |= {
        "data/parts/a.jsonl": lines(0, 20),
        "data/parts/b.jsonl": lines(20, 20),
        "data/x.jsonl": lines(0, 1),
    }
    outcome = bench.tokenize("--data", url)
    assert outcome.code == 0, outcome.err
    files = bench.manifest()["datasets"][0]["files"]
    assert [(file["name"], file["rows"]) for file in files] == [
        ("s3://data/parts/a.jsonl", 20),
        ("s3://data/parts/b.jsonl", 20),
    ]
    assert [document["line"] for document in bench.documents()] == [*range(1, 21), *range(1, 21)]


@pytest.mark.parametrize("place", [GOOGLE, HUB])
def test_google_s_and_the_hub_s_files(bench, store, place):
    root = place.split("://")[1].removeprefix("datasets/")
    store.objects |= {f"{root}a/1.jsonl": lines(0, 40), f"{root}a/2.jsonl": lines(40, 9), f"{root}x.txt": b"?"}
    same_as_local(bench, lines(0, 40), "1.jsonl", f"{place}a/1.jsonl")
    for number, several in enumerate([f"{place}a", f"{place}a/*.jsonl"]):
        outcome = bench.tokenize("--data", several, run_name=f"several-{number}")
        assert outcome.code == 0, outcome.err
        (dataset,) = bench.manifest(f"several-{number}")["datasets"]
        assert [(file["name"], file["rows"]) for file in dataset["files"]] == [
            (f"{place}a/1.jsonl", 40),
            (f"{place}a/2.jsonl", 9),
        ]
    missing = bench.tokenize("--data", f"{place}none.jsonl", run_name="none")
    assert (missing.code, missing.err.count("\n")) == (2, 1)
    assert f"{place}none.jsonl: no such file: check the address" in missing.err


def test_a_data_set_that_the_hub_does_not_have(bench, store):
    outcome = bench.tokenize("--data", "hf://datasets/nobody/nothing/train.jsonl")
    assert outcome.code == 2
    assert "nothing/train.jsonl: the Hub has no such data set, or a private one: check the name" in outcome.err


def test_compressed(bench, store):
    store.objects["data/train.jsonl.gz"] = gzip.compress(lines(0, 50), mtime=0)
    same_as_local(bench, gzip.compress(lines(0, 50), mtime=0), "train.jsonl.gz", "s3://data/train.jsonl.gz")


def test_parquet(bench, store):
    table = pa.table({"prompt": [f"Q {n}?" for n in range(70)], "gold": [f"A {n}." for n in range(70)]})
    written = io.BytesIO()
    parquet.write_table(table, written)
    store.objects["data/train.parquet"] = written.getvalue()
    same_as_local(bench, written.getvalue(), "train.parquet", "s3://data/train.parquet")


def test_http(bench, store):
    store.objects["data/train.jsonl"] = lines(0, 60)
    same_as_local(bench, lines(0, 60), "train.jsonl", f"{store.address}/data/train.jsonl")


def test_a_validation_share(bench, store):
    store.objects["data/train.jsonl"] = lines(0, 100)
    outcome = bench.tokenize("--data", "s3://data/train.jsonl", "--val", "10%")
    assert outcome.code == 0, outcome.err
    assert [bench.manifest(name)["documents"] for name in ("r", "r-val")] == [90, 10]


def test_it_is_read_in_pieces(bench, store, monkeypatch):
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 1 << 16)
    store.objects["data/large.jsonl"] = lines(0, 30_000)
    outcome = bench.tokenize("--data", "s3://data/large.jsonl")
    assert outcome.code == 0, outcome.err
    assert bench.manifest()["documents"] == 30_000
    size = len(store.objects["data/large.jsonl"])
    assert max(store.asked) <= CHUNK_BYTES + (1 << 16)  # a piece, and what is read ahead of it
    assert sum(store.asked) < 1.5 * size + (1 << 22)  # the first piece more than once, everything else once


def test_an_object_that_changes_while_it_is_read(bench, store):
    store.objects["data/train.jsonl"] = lines(0, 300)
    store.change_after = 2
    outcome = bench.tokenize("--data", "s3://data/train.jsonl")
    assert outcome.code == 2
    assert "s3://data/train.jsonl was changed while it was read: start again when it is finished" in outcome.err


def test_bad_rows_have_their_place(bench, store):
    store.objects["data/train.jsonl"] = lines(0, 3) + b'{"prompt": "Q"}\n'
    outcome = bench.tokenize("--data", "s3://data/train.jsonl")
    assert outcome.code == 2
    assert "s3://data/train.jsonl line 4: no key 'gold'" in outcome.err


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("s3://data/none.jsonl", 2, "s3://data/none.jsonl: no such file: check the address"),
        ("s3://data/none*.jsonl", 2, "s3://data/none*.jsonl: no such file: check the address"),
        ("http://127.0.0.1:9/train.jsonl", 3, "http://127.0.0.1:9/train.jsonl cannot be read"),
        ("quack://data/train.jsonl", 2, "no installed package reads quack://: fetch the file, and name it by its path"),
    ],
)
def test_what_cannot_be_read(bench, store, url, code, message):
    outcome = bench.tokenize("--data", url)
    assert outcome.code == code, outcome.err
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_a_missing_package_is_named(bench, store, monkeypatch):
    import fsspec

    def missing(_: str) -> None:
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    outcome = bench.tokenize("--data", "gs://data/train.jsonl")
    assert outcome.code == 2
    assert "gs://data/train.jsonl needs gcsfs: pip install 'megasft[remote]'" in outcome.err
