"""Files that hold users' text are readable by their owner only, from the moment they exist and whatever the umask."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from sft.evaluate import evaluation, lines
from sft.spec import metrics, run_folder
from tests.conftest import pair
from tokenize_data import files


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_all_that_the_data_stage_writes_of_rows(bench, umask):
    data = bench.write(json.dumps(pair()) + "\nx\n")
    for flags in ((), ("--retokenize",)):
        assert bench.tokenize("--data", data, "--max_bad_rows", "1", *flags).code == 0
        folder = bench.tokenized / "r"
        modes = {file.name: oct(mode(file)) for file in folder.iterdir() if file.is_file()}
        assert len(modes) == 4  # a shard, the index, the manifest, the rejected rows
        assert set(modes.values()) == {"0o600"}, modes
        for file in folder.iterdir():
            file.chmod(0o755)  # as an older version left them


def test_all_that_a_run_writes_of_text(tmp_path, umask):
    def write() -> None:
        run_folder.write_status(
            tmp_path, state="failed", iteration=1, iterations=2, reason="line 3: the patient's name"
        )
        run_folder.write_run_toml(tmp_path, config={"system": "secret"}, resolved={}, versions={})
        run_folder.replace_file(tmp_path / "report.html", "secret")
        metrics.MetricsFile(tmp_path / "metrics.jsonl").append({"iteration": 1})
        metrics.MetricsFile(tmp_path / "metrics.jsonl").rewind(1)
        metrics.MetricsFile(tmp_path / "metrics.jsonl").append({"iteration": 2})
        with lines.LineStore(tmp_path / "judge.jsonl", lambda record: record["id"]) as store:
            store.add({"id": "secret"})
        with lines.LineStore(tmp_path / "answers.jsonl", lambda record: record["id"]) as store:
            store.replace([{"id": "secret"}])
        lines.write_json(tmp_path / "scores.json", {"secret": 1})
        evaluation.write_predictions(
            [SimpleNamespace(predictions={"a": [{"answer": "secret"}]})], tmp_path / "predictions.jsonl"
        )  # type: ignore[list-item]

    for _ in range(2):
        write()
        modes = {file.name: oct(mode(file)) for file in tmp_path.iterdir()}
        assert len(modes) == 8
        assert set(modes.values()) == {"0o600"}, modes
        for file in tmp_path.iterdir():
            file.chmod(0o644)


def test_a_file_is_private_before_it_has_a_first_byte(tmp_path, monkeypatch):
    """Without the change of mode, which comes after the file exists, its mode is right already."""
    before = os.umask(0)
    monkeypatch.setattr(os, "fchmod", lambda handle, mode: None)
    try:
        files.open_private(tmp_path / "new").close()
        files.append_private(tmp_path / "appended").close()
        files.replace_private(tmp_path / "replaced", b"x", tmp_path / "scratch")
    finally:
        os.umask(before)
    assert {oct(mode(file)) for file in tmp_path.iterdir()} == {"0o600"}


def test_a_umask_that_takes_the_owners_own_rights_away(tmp_path):
    before = os.umask(0o777)
    try:
        files.open_private(tmp_path / "new").close()
        files.append_private(tmp_path / "appended").close()
    finally:
        os.umask(before)
    assert {oct(mode(file)) for file in tmp_path.iterdir()} == {"0o600"}


def test_who_opened_an_old_file_does_not_see_what_replaces_it(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with path.open("rb") as reader, files.open_private(path) as file:
        file.write(b"secret")
        file.flush()
        assert reader.read() == b"old"
    assert path.read_bytes() == b"secret"


def test_a_link_in_place_of_a_scratch_file_is_not_followed(tmp_path):
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "scratch").symlink_to(tmp_path / "target")
    files.replace_private(tmp_path / "file", b"new", tmp_path / "scratch")
    assert (tmp_path / "target").read_bytes() == b"precious"
    assert not (tmp_path / "file").is_symlink()
