"""Whatever is wrong with the input: one line that names the place, the value and the remedy, exit code 2, and nothing
left behind.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys

import pytest
import zstandard

from tests.conftest import pair

GOOD = json.dumps(pair()).encode()


def line(**row) -> bytes:
    return json.dumps(row).encode()


BAD_LINES = {
    "malformed": (b'{"prompt": "a", "gold": }', ["line 2", "not valid JSON", "character"]),
    "missing key": (line(prompt="a"), ["line 2", "no key 'gold'", "'prompt'"]),
    "misspelt key": (line(prompt="a", gold_="b"), ["line 2", "did you mean 'gold_'? Use --answer_key gold_"]),
    "number": (line(prompt="a", gold=5), ["line 2", "'gold' is a number (5), not text"]),
    "list": (line(prompt=["a"], gold="b"), ["line 2", "'prompt' is a list"]),
    "null": (line(prompt=None, gold="b"), ["line 2", "'prompt' is null"]),
    "true": (line(prompt=True, gold="b"), ["line 2", "true or false"]),
    "empty answer": (line(prompt="a", gold=""), ["line 2", "'gold' is empty"]),
    "blank answer": (line(prompt="a", gold=" \n\t"), ["line 2", "'gold' is empty"]),
    "NaN": (b'{"prompt": "a", "gold": NaN}', ["line 2", "NaN", "not JSON"]),
    "two objects": (GOOD + b" " + GOOD, ["line 2", "two objects on one line", "character 38"]),
    "not an object": (b'["a", "b"]', ["line 2", "a list", "not an object"]),
    "not UTF-8": (b'{"prompt": "caf\xe9", "gold": "b"}', ["line 2", "not UTF-8: byte 0xe9 at 16"]),
    "raw NUL": (b'{"prompt": "a\x00", "gold": "b"}', ["line 2", "NUL"]),
    "escaped NUL": (b'{"prompt": "a\\u0000", "gold": "b"}', ["line 2", "NUL character at 1"]),
    "half of a surrogate pair": (
        b'{"prompt": "a\\ud83d", "gold": "b"}',
        ["line 2", "half of a surrogate pair (\\ud83d)"],
    ),
    "30 MB": (line(prompt="word " * 6_000_000, gold="b"), ["line 2", "30,000,", "bytes long"]),
    "deep": (b"[" * 5000 + b"]" * 5000, ["line 2", "nested"]),
    "long number": (b'{"prompt": ' + b"1" * 5000 + b', "gold": "b"}', ["line 2"]),
}


def check_refused(bench, outcome, fragments):
    assert outcome.code == 2, outcome
    assert outcome.err.count("\n") == 1, outcome.err
    assert "Traceback" not in outcome.err
    for fragment in fragments:
        assert fragment in outcome.err
    left = sorted(entry.name for entry in bench.tokenized.iterdir()) if bench.tokenized.exists() else []
    assert left == []


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line(bench, name):
    bad, fragments = BAD_LINES[name]
    data = bench.write(GOOD + b"\n" + bad + b"\n" + GOOD + b"\n")
    check_refused(
        bench, bench.tokenize("--data", data), [*fragments, "data.jsonl", "3 rows read = 2 accepted + 1 rejected"]
    )
    outcome = bench.tokenize("--data", data, "--max_bad_rows", "1")
    assert outcome.code == 0, outcome.err
    assert "3 rows read = 2 accepted + 1 rejected" in outcome.out
    (rejected,) = map(json.loads, (bench.tokenized / "r" / "rejected.jsonl").read_text().splitlines())
    assert rejected["line"] == 2
    assert all(fragment in f"line 2 {rejected['reason']}" for fragment in fragments)


def test_more_bad_rows_than_allowed(bench):
    data = bench.write(b"\n".join([GOOD, b"x", b"y", GOOD, b""]))
    outcome = bench.tokenize("--data", data, "--max_bad_rows", "1")
    check_refused(bench, outcome, ["more than 1 bad rows", "line 2", "4 rows read = 2 accepted + 2 rejected"])


def test_only_bad_rows(bench):
    outcome = bench.tokenize("--data", bench.write(b"x\ny\n"), "--max_bad_rows", "5")
    check_refused(bench, outcome, ["no row can be used", "line 1"])


def test_bad_files(bench):
    whole = GOOD + b"\n"
    zst = zstandard.ZstdCompressor().compress(whole * 1000)
    (bench.root / "folder").mkdir()
    cases = {
        bench.write(b"", "empty.jsonl"): ["is empty"],
        bench.write(b"\n \n\n", "blank.jsonl"): ["no row can be used"],
        bench.root / "data.josnl": ["No such file"],
        bench.root / "folder": ["is a directory without data files"],
        bench.write(gzip.compress(whole * 1000)[:-20], "cut.jsonl.gz"): ["cut short or damaged"],
        bench.write(zst[:-6], "cut.jsonl.zst"): ["cut short"],
        bench.write(b"not zstd at all", "bad.jsonl.zst"): ["is damaged"],
        bench.write(b"not gzip at all", "bad.jsonl.gz"): ["cut short or damaged"],
        bench.write(whole.decode().encode("utf-16"), "utf16.jsonl"): ["UTF-16"],
        bench.write(b"PAR1 no", "bad.parquet"): ["cannot be read"],
        bench.write(b"[{]", "bad.json"): ["cannot be read"],
    }
    for path, fragments in cases.items():
        fragments = [fragment.replace("No such", "no such") for fragment in fragments]
        check_refused(bench, bench.tokenize("--data", path), [path.name, *fragments])


def test_a_missing_file_names_its_neighbours(bench):
    bench.write(GOOD, "train.jsonl")
    check_refused(bench, bench.tokenize("--data", bench.root / "trian.jsonl"), ["no such file", "has train.jsonl"])


@pytest.mark.parametrize("name", ["a/b", "..", ".", ".hidden", "a b", "", "a\nb", "../../etc"])
def test_run_names_that_leave_the_root(bench, name):
    outcome = bench.tokenize("--data", bench.write(GOOD), run_name=name)
    check_refused(bench, outcome, ["--run_name", "letters, digits"])


def test_a_symbolic_link_that_leaves_the_root(bench, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    bench.tokenized.mkdir()
    (bench.tokenized / "r").symlink_to(tmp_path / "elsewhere")
    outcome = bench.tokenize("--data", bench.write(GOOD))
    assert outcome.code == 2
    assert "symbolic link" in outcome.err
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_folder_with_other_peoples_files_is_not_touched(bench):
    (bench.tokenized / "r").mkdir(parents=True)
    (bench.tokenized / "r" / "thesis.tex").write_text("precious")
    outcome = bench.tokenize("--data", bench.write(GOOD))
    assert outcome.code == 2
    assert "thesis.tex" in outcome.err
    assert (bench.tokenized / "r" / "thesis.tex").read_text() == "precious"


def test_no_data_and_no_shards(bench):
    check_refused(bench, bench.tokenize(), ["no tokenised data", "--data"])


def test_a_document_without_trained_tokens_within_seq(bench):
    data = bench.jsonl([pair(), pair("long " * 100)])
    check_refused(
        bench, bench.tokenize("--data", data, "--seq", "64"), ["line 2", "none of the first 64 is trained", "--seq"]
    )


def test_documents_are_cut_at_seq_and_counted(bench):
    data = bench.jsonl([pair(), pair(answer="word " * 300)])
    outcome = bench.tokenize("--data", data, "--seq", "64")
    assert outcome.code == 0
    assert "1 cut at 64 tokens" in outcome.out
    assert "1 of 2 documents (50.0%) were cut" in outcome.err
    assert "the end of turn is not trained in 1 of 2 documents" in outcome.err
    assert [len(document["ids"]) for document in bench.documents()][1] == 64
    assert bench.documents()[1]["cut"] > 200


@pytest.mark.parametrize(("flag", "value"), [("--seq", "1"), ("--workers", "0"), ("--max_bad_rows", "-1")])
def test_numbers_out_of_range(bench, flag, value):
    check_refused(bench, bench.tokenize("--data", bench.write(GOOD), flag, value), [flag, value, "at least"])


def test_unknown_format_and_template(bench):
    data = bench.write(GOOD)
    check_refused(bench, bench.tokenize("--data", data, "--format", "alpca"), ["--format alpca: use one of", "alpaca"])
    check_refused(
        bench,
        bench.tokenize("--data", data, "--template", "nope.jinja"),
        ["nope.jinja", "no such file".capitalize()[:2]],
    )


def test_checkpoints(bench, tmp_path, monkeypatch):
    data = bench.write(GOOD)
    (tmp_path / "no-tokenizer").mkdir()
    for checkpoint, fragments in (
        ("meditrn", ["did you mean 'meditron'?"]),
        (tmp_path / "nowhere" / "x", ["no such folder"]),
        (tmp_path / "no-tokenizer", ["has no tokenizer", "tokenizer.json"]),
    ):
        check_refused(bench, bench.tokenize("--data", data, checkpoint=checkpoint), fragments)
    own = tmp_path / "own.toml"
    for content, fragments in (
        ("[a.7]\npath = 'x'\ntpp = 2", ["unknown key 'tpp', did you mean 'tp'?"]),
        ("[a.7]\ntp = 2", ["'path' is missing"]),
        ("[a.7]\npath = '${NO_SUCH_VARIABLE}/x'", ["NO_SUCH_VARIABLE"]),
        ("[a]\npath = 'x'", ["[a] needs a size"]),
        ("[a.13]\npath = 'x'", ["no size '7'", "13"]),
        ("[a.7", ["not valid TOML"]),
        ("[a.7]\npath = 5", ["path must be str"]),
        ("[a.7]\npath = 'x'\nadd_tokens = [1]", ["add_tokens"]),
    ):
        own.write_text(content)
        check_refused(bench, bench.tokenize("--data", data, "--checkpoints_file", own, checkpoint="a"), fragments)


def test_a_damaged_tokenizer(bench, tmp_path):
    for name, content in (("tokenizer.json", "{"), ("tokenizer.model", "not a model")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(content)
        (folder / "config.json").write_text('{"model_type": "llama"}')
        outcome = bench.tokenize("--data", bench.write(GOOD), checkpoint=folder)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
        assert str(folder) in outcome.err


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_no_permission(bench, smollm2):
    """Run as a user who may read the program, but not the data or the output folder."""
    script = (
        "import os, sys, rich.console, rich.progress, multiprocessing.popen_fork; from tokenize_data import cli, "
        "describe, sources, stage; "
        "''.encode('unicode-escape'); os.setuid(65534); sys.exit(cli.entry(sys.argv[1:]))"
    )
    data, secret = bench.write(GOOD), bench.write(GOOD, "secret.jsonl")
    secret.chmod(0o600)
    for folder in (bench.root, *list(bench.root.parents)[:3]):
        folder.chmod(0o755)
    for file, fragment in ((data, "you may not write there"), (secret, "cannot be read: Permission denied")):
        command = [
            sys.executable,
            "-c",
            script,
            "--run_name",
            "r",
            "--data",
            file,
            "--checkpoint",
            smollm2,
            "--tokenized_data_dir",
            bench.tokenized,
        ]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert fragment in done.stderr


@pytest.mark.parametrize(("rows", "limit"), [(3000, 200_000), (3, 1_000_000)])
def test_a_full_disk(bench, smollm2, rows, limit):
    """A file size limit stands for it: the write of a shard, or of the tokenizer, fails half-way, and nothing is
    left.
    """
    data = bench.jsonl([pair(f"Is {number} a number?", "Yes. " * 50) for number in range(rows)])
    script = (
        "import resource, sys; from tokenize_data.cli import entry; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.exit(entry(sys.argv[1:]))"
    )
    arguments = ["--run_name", "r", "--data", data, "--checkpoint", smollm2, "--tokenized_data_dir", bench.tokenized]
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "file size limit" in done.stderr
    assert sorted(bench.tokenized.iterdir()) == []
