"""What lies on disk: the manifest, the reader, damage, stale shards, two runs at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import pair
from tests.counting import lines_run
from tokenize_data import lock
from tokenize_data.convert import Converted
from tokenize_data.errors import FailedError, UserError
from tokenize_data.reader import ShardReader
from tokenize_data.records import RowReader
from tokenize_data.shards import ShardWriter
from tokenize_data.sources import Chunk


def make(bench, count=5, *arguments):
    data = bench.jsonl([pair(f"Is {number}?", "Yes. " * (number % 7 + 1)) for number in range(count)])
    outcome = bench.tokenize("--data", data, *arguments)
    assert outcome.code == 0, outcome.err
    return data


def test_manifest_says_all_that_is_known(bench):
    data = make(bench)
    manifest = bench.manifest()
    assert manifest["documents"] == 5
    assert manifest["rows"] == {"read": 5, "accepted": 5, "rejected": 0, "left_out": 0}
    assert manifest["id_type"] == "uint16"
    assert manifest["seq"] == 2048
    (file,) = manifest["datasets"][0]["files"]
    assert (file["name"], file["size"], file["rows"]) == (str(data), data.stat().st_size, 5)
    assert (
        len(file["sha256"])
        == len(manifest["tokenizer"]["fingerprint"])
        == len(manifest["template"]["fingerprint"])
        == 64
    )
    assert manifest["tokenizer"]["stop_ids"] == [2]
    assert {"tokenizers", "pyarrow", "tokenize_data"} <= set(manifest["versions"])
    assert sum(manifest["role_tokens"].values()) == manifest["tokens"]


def test_nothing_but_what_the_manifest_names_stays(bench):
    make(bench)
    make(bench, 5, "--retokenize")
    named = {entry["file"].split("/")[0] for key in ("shards", "files") for entry in bench.manifest()[key]}
    named |= {bench.manifest()["index"]["file"], "manifest.json"}
    assert {entry.name for entry in (bench.tokenized / "r").iterdir()} == named
    assert [entry.name for entry in bench.tokenized.iterdir()] == ["r"]


def test_rejected_rows_go_with_their_data_set(bench):
    bench.tokenize("--data", bench.write(json.dumps(pair()) + "\nx\n"), "--max_bad_rows", "1")
    assert (bench.tokenized / "r" / "rejected.jsonl").exists()
    bench.tokenize("--data", bench.jsonl([pair()]), "--retokenize")
    assert not (bench.tokenized / "r" / "rejected.jsonl").exists()


def test_several_workers_give_the_same_files_as_one(bench):
    data = bench.jsonl([pair(f"Is {number}?", "Yes. " * (number % 50 + 1)) for number in range(30_000)])
    for run_name, workers in (("one", "1"), ("three", "3")):
        assert bench.tokenize("--data", data, "--workers", workers, run_name=run_name).code == 0
    one, three = bench.manifest("one"), bench.manifest("three")
    assert [shard["sha256"] for shard in one["shards"]] == [shard["sha256"] for shard in three["shards"]]
    assert one["index"]["sha256"] == three["index"]["sha256"]
    reader = ShardReader(bench.tokenized / "one")
    for number in (0, 1023, 1024, 29_999):
        assert reader.place(number)[1] == number + 1
        assert len(reader[number].ids) == reader.lengths[number] == reader[number].run_lengths.sum()
        assert reader[number].trained().sum() == reader.trained[number]
    assert reader[-1].ids.tolist() == reader[29_999].ids.tolist()
    with pytest.raises(IndexError):
        reader[30_000]


def write_many(folder, documents, length):
    folder.mkdir()
    writer = ShardWriter(folder, "part-x", np.dtype(np.uint16))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 60_000, documents * length).astype(np.uint16)
    for start in range(0, documents, 5000):
        count = min(5000, documents - start)
        chunk = Converted(
            Chunk(0, start + 1, b"", 0), ids=ids[start * length : (start + count) * length], lengths=[length] * count
        )
        chunk.trained, chunk.cut, chunk.lines = (
            [length // 2] * count,
            [0] * count,
            list(range(start + 1, start + count + 1)),
        )
        chunk.runs_per_document, chunk.run_roles = [2] * count, [2, 3] * count
        chunk.run_lengths = [length // 2, length - length // 2] * count
        writer.add(chunk)
    return ids, *writer.close()


def test_writer_and_reader_agree_on_many_documents(bench, monkeypatch):
    make(bench)
    monkeypatch.setattr("tokenize_data.shards.SHARD_BYTES", 1 << 20)
    folder = bench.tokenized / "many"
    ids, shards, index = write_many(folder, 200_000, 10)
    assert len(shards) > 4
    assert sum(shard.documents for shard in shards) == 200_000
    manifest = {**bench.manifest(), "run_name": "many", "documents": 200_000, "files": []}
    manifest |= {"shards": [vars(shard) for shard in shards], "index": vars(index)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert (
        lines_run(lambda: ShardReader(folder)[123_456]) < 10_000
    )  # of Python: shards are looped over, documents are not
    reader = ShardReader(folder)
    assert len(reader.lengths) == len(reader) == 200_000
    for number in (0, 1023, 1024, 99_999, 199_999):
        assert reader[number].ids.tolist() == ids[number * 10 : number * 10 + 10].tolist()
    assert not reader[5].ids.flags.owndata
    reader.verify()


def test_the_reader_imports_no_torch():
    script = (
        "import tokenize_data.reader, tokenize_data.stage, sys; sys.exit('torch' in sys.modules or 'transformers' "
        "in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[: -8 if how == "cut" else None]) if how != "delete" else path.unlink()


@pytest.mark.parametrize("how", ["cut", "flip", "delete"])
@pytest.mark.parametrize("kind", ["shards", "index", "files"])
def test_damage_names_the_file(bench, kind, how):
    make(bench)
    entry = bench.manifest()[kind]
    name = (entry[0] if isinstance(entry, list) else entry)["file"]
    damage(bench.tokenized / "r" / name, how)
    outcome = bench.inspect("--verify")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert name in outcome.err
    assert "--retokenize" in outcome.err
    if how != "flip":
        assert name in bench.inspect().err
    assert bench.tokenize("--data", bench.root / "data.jsonl", "--retokenize").code == 0
    assert bench.inspect("--verify").code == 0


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 99}', '{"version": 1}', ""])
def test_a_damaged_manifest(bench, content):
    make(bench)
    (bench.tokenized / "r" / "manifest.json").write_text(content)
    for outcome in (bench.inspect(), bench.tokenize("--data", bench.root / "data.jsonl")):
        assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
        assert "manifest.json" in outcome.err
        assert "--retokenize" in outcome.err
    assert bench.tokenize("--data", bench.root / "data.jsonl", "--retokenize").code == 0


def test_no_manifest_no_data_set(bench):
    make(bench)
    (bench.tokenized / "r" / "manifest.json").unlink()
    with pytest.raises(UserError, match="never finished"):
        ShardReader(bench.tokenized / "r")
    with pytest.raises(UserError, match="does not exist"):
        ShardReader(bench.tokenized / "other")
    assert bench.tokenize("--data", bench.root / "data.jsonl").code == 0


# ---- stale shards


def test_same_command_again_uses_the_shards(bench):
    data = make(bench)
    before = bench.manifest()
    outcome = bench.tokenize("--data", data)
    assert f"using {bench.tokenized / 'r'}: 5 documents" in outcome.out
    assert outcome.err == ""
    assert bench.manifest() == before
    assert bench.tokenize().code == 0


def test_what_differs_is_named(bench):
    data = make(bench)
    copy = bench.write(data.read_bytes(), "same-contents.jsonl")
    assert bench.tokenize("--data", copy).err == ""
    cases = [
        (["--data", bench.jsonl([pair("other")], "other.jsonl")], ["contents of", "other.jsonl", "data.jsonl"]),
        (["--data", data, "--seq", "512"], ["sequence length: made with --seq 2048, asked for 512"]),
        (["--data", data, "--question_key", "q"], ["question_key: made with 'prompt', asked for 'q'"]),
        (["--data", data, data], ["files: made of"]),
        (["--data", bench.root / "gone.jsonl"], ["gone.jsonl: missing now"]),
        (["--data", data, "--format", "chat"], ["format: made with None, asked for 'chat'"]),
    ]
    for arguments, fragments in cases:
        outcome = bench.tokenize(*arguments)
        assert outcome.code == 0, outcome.err
        assert outcome.err.startswith("tokenize_data: warning: ")
        assert outcome.err.count("\n") == 1
        for fragment in [*fragments, "--retokenize"]:
            assert fragment in outcome.err
    data.write_text(json.dumps(pair("changed")) + "\n")
    assert "contents of" in bench.tokenize("--data", data).err
    recipe = bench.write(f"datasets:\n  - files: [{data}]\n    prompt: 'Q: {{prompt}}'\n", "r.yaml")
    assert "prompt: made with None, asked for 'Q: {prompt}'" in bench.tokenize("--config", recipe).err


def test_another_tokenizer_or_template_is_an_error_with_both_fingerprints(bench, family):
    data = make(bench)
    made = bench.manifest()
    outcome = bench.tokenize("--data", data, checkpoint=family("gpt2"))
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert made["tokenizer"]["fingerprint"][:16] in outcome.err
    assert "another tokenizer" in outcome.err
    outcome = bench.tokenize("--data", data, "--template", "megatron")
    assert outcome.code == 2
    assert made["template"]["fingerprint"][:16] in outcome.err
    assert "another template" in outcome.err
    assert bench.manifest() == made
    assert bench.tokenize("--data", data, "--template", "megatron", "--retokenize").code == 0
    assert bench.manifest()["template"]["name"] == "megatron"


def test_fingerprints_are_of_contents_not_of_names(bench, smollm2, tmp_path):
    import shutil

    make(bench)
    shutil.copytree(smollm2, tmp_path / "copy-with-another-name")
    assert bench.tokenize("--data", bench.root / "data.jsonl", checkpoint=tmp_path / "copy-with-another-name").code == 0


def test_a_failed_retokenize_keeps_the_old(bench):
    make(bench)
    before = bench.manifest()
    outcome = bench.tokenize("--data", bench.write("x\n", "bad.jsonl"), "--retokenize")
    assert outcome.code == 2
    assert bench.manifest() == before
    assert bench.inspect("--verify").code == 0


def test_added_tokens_are_stored_and_round_trip(bench, family):
    from transformers import AutoTokenizer

    own = bench.write(f"[own.7]\npath = '{family('llama2')}'\nadd_tokens = ['<|context|>', '<s>']\n", "own.toml")
    data = bench.jsonl([pair("<|context|> Is it?")])
    outcome = bench.tokenize("--data", data, "--checkpoints_file", own, "--template", "llama2", checkpoint="own")
    assert outcome.code == 0, outcome.err
    assert "checkpoints.toml adds <|context|> to the tokenizer" in outcome.out
    tokenizer = bench.manifest()["tokenizer"]
    assert tokenizer["added"] == ["<|context|>"]
    stored = AutoTokenizer.from_pretrained(bench.tokenized / "r" / tokenizer["folder"])
    added = stored.convert_tokens_to_ids("<|context|>")
    assert added == tokenizer["vocabulary_size"] - 1
    assert added in bench.documents()[0]["ids"]
    prompt = stored.apply_chat_template(
        [{"role": "user", "content": "<|context|> Is it?"}], add_generation_prompt=True, return_dict=False
    )
    assert prompt == bench.documents()[0]["ids"][: len(prompt)]


def test_megatron_says_what_it_adds(bench, family):
    outcome = bench.tokenize("--data", bench.jsonl([pair()]), checkpoint=family("llama2"))
    assert "template 'megatron' adds <|im_start|> <|im_end|> to the tokenizer" in outcome.out
    assert bench.manifest()["tokenizer"]["stop_ids"][0] == bench.manifest()["tokenizer"]["vocabulary_size"] - 1


# ---- two at once


def test_of_two_at_once_one_works_and_the_other_waits(bench, smollm2):
    data = bench.jsonl([pair(f"Is {number}?", "Yes. " * 100) for number in range(20_000)])
    command = [sys.executable, "-m", "tokenize_data", "--run_name", "r", "--data", data, "--checkpoint", smollm2]
    command += ["--tokenized_data_dir", bench.tokenized, "--workers", "1"]
    processes = [subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    workers = [output for output in outputs if "20,000 rows read" in output and "using" not in output]
    waiters = [output for output in outputs if "waiting for it" in output]
    assert len(workers) == 1
    assert len(waiters) == 2
    pids = {process.pid for process in processes}
    assert all(any(f"process {pid} on " in output for pid in pids) for output in waiters)
    assert all("using" in output for output in waiters)
    assert sorted(entry.name for entry in bench.tokenized.iterdir()) == ["r"]


def test_a_lock_file_without_a_holder_does_not_block(tmp_path):
    (tmp_path / "lock").write_text('{"pid": 1, "host": "gone"}')
    said = []
    with lock.exclusive(tmp_path / "lock", said.append):
        pass
    assert said == []
    assert not (tmp_path / "lock").exists()


def test_a_killed_worker_is_an_error_not_a_missing_chunk():
    from tokenize_data.pool import ordered_map

    assert list(ordered_map(lambda number: number * 2, range(50), 3)) == [number * 2 for number in range(50)]
    with pytest.raises(FailedError, match=r"killed \(SIGKILL\), probably because memory ran out: use fewer --workers"):
        list(ordered_map(lambda number: os.kill(os.getpid(), 9) if number == 7 else number, range(20), 2))
    with pytest.raises(ZeroDivisionError):
        list(ordered_map(lambda number: 1 // (number - 3), range(20), 2))


def test_a_killed_worker_is_no_mistake_of_the_user(bench, monkeypatch):
    """Exit code 3, so that a sweep or a queue may try again."""
    parent = os.getpid()
    read = RowReader.conversation
    monkeypatch.setattr(
        RowReader, "conversation", lambda *of: os.kill(os.getpid(), 9) if os.getpid() != parent else read(*of)
    )
    outcome = bench.tokenize("--data", bench.jsonl([pair()] * 400), "--workers", "2")
    assert outcome.code == 3, outcome
    assert outcome.err == (
        "tokenize_data: a worker process was killed (SIGKILL), probably because memory ran out: use fewer --workers\n"
    )


def test_a_data_set_that_is_kept_open_outlives_its_files(bench, monkeypatch):
    """Another takes its place while it is read."""
    monkeypatch.setattr("tokenize_data.shards.SHARD_BYTES", 1 << 10)
    make(bench, 3000)
    folder = bench.tokenized / "r"
    whole = ShardReader(folder)
    assert len(whole.manifest.shards) > 2
    expected = [document.ids.tolist() for document in whole]
    kept = ShardReader(folder).keep_open()
    make(bench, 4, "--retokenize")
    assert len(ShardReader(folder)) == 4
    assert [document.ids.tolist() for document in kept] == expected
    assert len(kept.lengths) == len(kept.trained) == 3000
