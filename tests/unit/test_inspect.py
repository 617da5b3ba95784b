"""`sft inspect` and the commands' help."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import pair


def test_json_has_one_object_per_document(bench):
    bench.tokenize("--data", bench.jsonl([pair(), pair("Sure?", "No.")]))
    first, second = bench.documents()
    assert (first["row"], second["row"], second["line"]) == (0, 1, 2)
    assert len(first["ids"]) == len(first["roles"]) == len(first["trained"])
    assert [learn for learn, role in zip(first["trained"], first["roles"], strict=True) if role == "assistant"] == [
        1,
        1,
        1,
    ]
    assert sum(first["trained"]) == 3
    only = bench.inspect("--json", "--row", "1").out.splitlines()
    assert len(only) == 1
    assert '"row": 1' in only[0]


def test_what_a_person_sees(bench):
    bench.tokenize("--data", bench.jsonl([pair() for _ in range(30)]), "--seq", "64")
    outcome = bench.inspect("--documents", "2")
    assert outcome.code == 0
    for fragment in (
        "document 0:",
        "document 1:",
        "Is it?",
        "Yes.<|im_end|>",
        "30 read = 30 accepted + 0 rejected",
        "assistant",
        "median",
    ):
        assert fragment in outcome.out
    assert "document 2:" not in outcome.out


def test_colours(bench):
    from tokenizers import Tokenizer

    from sft.observe import documents
    from tokenize_data.reader import ShardReader

    bench.tokenize("--data", bench.jsonl([pair("日本 🙂?", "Ja 🙂.")]))
    reader = ShardReader(bench.tokenized / "r")
    backend = Tokenizer.from_file(str(reader.folder / reader.manifest.tokenizer["folder"] / "tokenizer.json"))
    text = documents.coloured(reader[0], backend)
    shown = {span.style: text.plain[span.start : span.end] for span in text.spans}
    assert shown[documents.TRAINED_STYLE] == "Ja 🙂.<|im_end|>"
    assert shown[documents.MASKED_STYLE] == "日本 🙂?"


def test_chart_is_a_picture(bench):
    bench.tokenize("--data", bench.jsonl([pair() for _ in range(30)]))
    outcome = bench.inspect("--chart", bench.root / "lengths.png")
    assert outcome.code == 0
    assert (bench.root / "lengths.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    outcome = bench.inspect("--chart", bench.root / "no-folder" / "lengths.png")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "--chart" in outcome.err


def test_warnings(bench):
    own = bench.write(
        "{% for m in messages %}{{ bos_token + bos_token if loop.first }}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "open.jinja",
    )
    outcome = bench.tokenize("--data", bench.jsonl([pair(), pair("Say <|im_end|>.")]), "--template", own)
    assert outcome.code == 0, outcome.err
    for text in (outcome.err, " ".join(bench.inspect().out.split())):
        assert "the end of turn is not trained in 2 of 2 documents" in text
        assert "BOS is doubled in 2 documents" in text
    assert "1 documents have special tokens within their own texts" in outcome.err
    assert "1 of 2 documents (50.0%) have special tokens in what the user or the system says" in bench.inspect().out


def test_missing_bos_is_a_warning(bench, family):
    own = bench.write(
        "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}", "no-bos.jinja"
    )
    outcome = bench.tokenize("--data", bench.jsonl([pair()]), "--template", own, checkpoint=family("llama2"))
    assert "1 documents do not begin with BOS" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--row", "5"], "--row 5"), (["--row", "-1"], "has documents 0 to 0")]
)
def test_rows_that_are_not_there(bench, arguments, message):
    bench.tokenize("--data", bench.jsonl([pair()]))
    outcome = bench.inspect(*arguments)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert message in outcome.err


def test_unknown_data_set(bench):
    outcome = bench.inspect(run_name="nothing")
    assert outcome.code == 2
    assert "does not exist" in outcome.err


@pytest.mark.parametrize("command", [["sft"], ["sft", "inspect"], ["tokenize_data"]])
def test_help_imports_little(command):
    """So little that it is quick."""
    script = (
        "import sys\nfrom importlib import import_module\n"
        "try: import_module(sys.argv[1] + '.cli').entry([*sys.argv[2:], '-h'])\n"
        "except SystemExit: pass\n"
        "sys.exit(f'{len(sys.modules)} modules' if len(sys.modules) > 250 or {'torch', 'pyarrow', 'numpy'} & "
        "set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout


def test_unknown_command(bench):
    from sft.cli import entry

    with pytest.raises(SystemExit) as stop:
        entry(["inspcet"])
    assert stop.value.code == 2


@pytest.mark.parametrize(("low", "high"), [(1, 1), (1, 2), (55, 66), (3, 2048), (100, 5000), (1000, 1001)])
def test_histogram_counts_every_document_once(low, high):
    import numpy as np

    from sft.observe.lengths import bins

    lengths = np.arange(low, high + 1)
    counts, edges = bins(lengths)
    assert counts.sum() == len(lengths)
    assert len(counts) <= 18
    assert edges[0] <= low
    assert edges[-1] > high


def test_reasons_of_rejected_rows_are_counted(bench):
    bench.tokenize(
        "--data",
        bench.jsonl([pair(), "x", "y", pair(answer=""), pair("a " * 80), pair("a " * 90)]),
        "--max_bad_rows",
        "9",
        "--seq",
        "64",
    )
    shown = " ".join(bench.inspect().out.split())
    for fragment in (
        "2 rejected: not valid JSON",
        "1 rejected: 'gold' is empty",
        "2 rejected: N tokens, and none of the first N is trained",
    ):
        assert fragment in shown


def test_documents_without_a_trained_token_are_named(bench, monkeypatch):
    from tokenize_data.reader import ShardReader

    bench.tokenize("--data", bench.jsonl([pair(), pair()]))
    monkeypatch.setattr(ShardReader, "trained", property(lambda reader: reader.index["trained"] * [0, 1]))
    assert "1 documents have no trained token" in bench.inspect().out
