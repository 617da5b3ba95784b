"""The files of a run and what is shown of it: status, run.toml, metrics, progress, header."""

from __future__ import annotations

import json
import string
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sft.observe.header import Facts, header, iterations_text
from sft.observe.progress import Progress, duration
from sft.spec import metrics
from sft.spec.metrics import MetricsFile
from sft.spec.run_folder import is_finished, read_status, to_toml, write_run_toml, write_status
from tokenize_data.errors import UserError


def record(iteration: int, **others: Any) -> dict[str, Any]:
    plain = {"loss": 1.23449, "lr": 1.9e-5, "grad_norm": 0.83, "seconds": 2.0, "tokens_per_second": 12345.4}
    return {"iteration": iteration, **plain, **others}


def test_importing_these_modules_brings_no_torch_and_no_matplotlib():
    names = ("spec.run", "spec.run_folder", "spec.metrics")
    names += tuple(f"observe.{name}" for name in ("progress", "header", "trackers", "chart", "report", "serve"))
    code = "import sys\n" + "".join(f"import sft.{name}\n" for name in names)
    code += "print({'torch', 'transformers', 'deepspeed', 'matplotlib', 'tensorboard'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# status.json


def test_a_status_is_read_as_written_and_leaves_no_scratch_file(tmp_path: Path):
    write_status(tmp_path / "run", state="running", iteration=3, iterations=10)
    write_status(
        tmp_path / "run", state="failed", iteration=4, iterations=10, reason="loss is NaN\nat iteration 4 \udcff"
    )
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status["state"], status["iteration"], status["iterations"]) == ("failed", 4, 10)
    assert status["reason"] == "loss is NaN\nat iteration 4 \\udcff"
    assert status["updated"].endswith("+00:00")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["status.json"]


@pytest.mark.parametrize(
    "content",
    ["", '{"state": "runn', "[]", '{"state": "lost", "iteration": 1, "iterations": 2}', '{"state": "running"}', "\xff"],
)
def test_a_damaged_status_is_none(tmp_path: Path, content: str):
    (tmp_path / "status.json").write_bytes(content.encode("latin-1"))
    assert read_status(tmp_path) is None
    assert read_status(tmp_path / "nowhere") is None


def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^cannot write .*status\.json: .*: check the folder and the free disk space$"):
        write_status(tmp_path / "file", state="running", iteration=0, iterations=1)


@pytest.mark.parametrize("name", ["hf", "adapter"])
def test_finished_means_that_the_model_is_there(tmp_path: Path, name: str):
    assert not is_finished(tmp_path)
    (tmp_path / name).mkdir()
    assert is_finished(tmp_path)


def test_a_run_of_adapters_is_not_finished_with_its_merged_model(tmp_path: Path):
    write_run_toml(tmp_path, config={"lora": 8}, resolved={}, versions={})
    (tmp_path / "hf").mkdir()
    assert not is_finished(tmp_path)
    (tmp_path / "adapter").mkdir()
    assert is_finished(tmp_path)


# run.toml

KEYS = st.text(string.ascii_letters + string.digits + '-_ ."\\é\n', max_size=8)
PLAIN = st.one_of(
    st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(st.characters(exclude_categories=["Cs"]))
)
VALUES = st.one_of(PLAIN, st.lists(PLAIN, max_size=3), st.lists(st.lists(PLAIN, max_size=2), max_size=2))
TABLES = st.dictionaries(KEYS, st.one_of(VALUES, st.dictionaries(KEYS, VALUES, max_size=3)), max_size=5)


@given(st.dictionaries(KEYS, TABLES, max_size=3))
def test_toml_is_read_back_as_written(tables: dict[str, Any]):
    assert tomllib.loads(to_toml(tables)) == tables


def test_toml_of_what_a_configuration_holds():
    table = {
        "size": None,
        "data": ("a.jsonl", 'b"c\\d.jsonl'),
        "path": Path("/x"),
        "half": "\udcff",
        "n": np.int64(3),
        "f": np.float64(0.5),
    }
    read = tomllib.loads(to_toml({"config": table}))
    assert read == {"config": {"data": ["a.jsonl", 'b"c\\d.jsonl'], "path": "/x", "half": "\\udcff", "n": 3, "f": 0.5}}
    assert to_toml({"versions": {"torch": "2.13.0+cpu"}}) == '[versions]\ntorch = "2.13.0+cpu"\n'
    with pytest.raises(TypeError, match=r"object has no place in run\.toml"):
        to_toml({"config": {"a": object()}})


def test_an_older_run_toml_is_kept_where_it_says_something_else(tmp_path: Path):
    def write(lr: float, dp: int = 1, torch: str = "2.13") -> list[str]:
        write_run_toml(
            tmp_path, config={"lr": lr, "id": None}, resolved={"layout": {"dp": dp}}, versions={"torch": torch}
        )
        return sorted(path.name for path in tmp_path.iterdir())

    assert write(1e-5) == ["run.toml"]
    assert write(1e-5, torch="2.14") == ["run.toml"]
    assert write(2e-5) == ["run-1.toml", "run.toml"]
    assert write(2e-5, dp=2) == ["run-1.toml", "run-2.toml", "run.toml"]
    (tmp_path / "run.toml").write_text("= damaged")
    assert len(write(2e-5)) == 4
    assert tomllib.loads((tmp_path / "run-1.toml").read_text())["config"] == {"lr": 1e-5}
    assert tomllib.loads((tmp_path / "run-1.toml").read_text())["versions"] == {"torch": "2.14"}
    assert tomllib.loads((tmp_path / "run.toml").read_text())["resolved"] == {"layout": {"dp": 1}}


# metrics.jsonl


def test_records_are_on_disk_at_once_and_come_back_in_order(tmp_path: Path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert metrics.read(tmp_path / "metrics.jsonl") == []
    for iteration in (1, 2):
        file.append(record(iteration))
        assert [found["iteration"] for found in metrics.read(tmp_path / "metrics.jsonl")] == list(
            range(1, iteration + 1)
        )


def test_what_json_cannot_hold_is_null_with_a_note(tmp_path: Path):
    written = MetricsFile(tmp_path / "m").append(
        record(1, loss=np.float32("nan"), grad_norm=float("-inf"), tokens=np.int64(5), note="odd")
    )
    (line,) = (tmp_path / "m").read_text().splitlines()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(line, parse_constant=refuse) == written
    assert (written["loss"], written["grad_norm"], written["tokens"]) == (None, None, 5)
    assert written["note"] == "odd, loss is NaN, grad_norm is -Infinity"


def test_rewind_drops_later_records_and_a_torn_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    assert file.rewind(5) == 0
    assert not path.exists()
    for iteration in range(1, 6):
        file.append(record(iteration))
    path.write_bytes(path.read_bytes() + b'{"iteration": 6, "lo')
    assert len(metrics.read(path)) == 5
    assert file.rewind(3) == 3
    file.append(record(4, loss=9.0))
    assert [(found["iteration"], found["loss"]) for found in metrics.read(path)] == [
        (1, 1.23449),
        (2, 1.23449),
        (3, 1.23449),
        (4, 9.0),
    ]
    assert path.read_bytes().endswith(b"}\n")


def test_a_record_after_a_torn_line_is_not_lost_with_it(tmp_path: Path):
    (tmp_path / "m").write_bytes(b'{"iteration": 1}\n{"itera')
    MetricsFile(tmp_path / "m").append({"iteration": 2})
    assert metrics.read(tmp_path / "m") == [{"iteration": 1}, {"iteration": 2}]


def test_metrics_that_cannot_be_written_or_read(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"^cannot write .*: Is a directory: check the folder and the disk, then run again to resume$"
    ):
        MetricsFile(tmp_path).append({"iteration": 1})
    with pytest.raises(UserError, match=r"^cannot read .*: Is a directory: give the folder of a run$"):
        metrics.read(tmp_path)


# progress


def plain_lines(
    iterations: int, drive: Callable[[Progress], None], start: int = 0, clock: Callable[[], float] = lambda: 0.0
) -> list[str]:
    console = Console(file=StringIO(), width=40)  # a narrow one: lines are not broken
    with Progress(console, iterations, start, clock) as progress:
        drive(progress)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_line_has_all_that_a_person_wants_to_know():
    (line,) = plain_lines(4688, lambda progress: progress.update(record(120, seconds=0.8)), start=119)
    assert line == "iteration 120/4,688  loss 1.2345  lr 1.9e-05  grad 0.83  12,345 tokens/s  1:00:54 left"


def test_without_a_terminal_lines_are_rare():
    time = iter(range(10**6))

    def drive(progress: Progress) -> None:
        for iteration in range(101, 1001):
            progress.update(record(iteration, **({"val_loss": 1.5, "val_accuracy": 0.612} if iteration == 120 else {})))

    lines = plain_lines(1000, drive, start=100, clock=lambda: float(next(time)))
    shown = [int(line.split()[1].split("/")[0].replace(",", "")) for line in lines]
    assert shown[:5] == [101, 102, 103, 120, 120]
    assert lines[4] == "iteration 120/1,000  validation loss 1.5000  accuracy 61.2%"
    assert all(later - earlier >= 50 for earlier, later in pairwise(shown[4:-1]))
    assert shown[-1] == 1000
    assert lines[-1].endswith("0:00:00 left")
    assert len(shown) < 25


def test_a_number_that_is_none_is_not_hidden_and_one_that_is_missing_is_not_shown():
    def drive(progress: Progress) -> None:
        progress.update({"iteration": 0, "val_loss": 2.0, "val_perplexity": 7.389})
        progress.update({"iteration": 1, "loss": None})
        progress.warn("[one] more than usual")

    assert plain_lines(2, drive) == [
        "iteration 0/2  validation loss 2.0000  perplexity 7.39",
        "iteration 1/2  loss nan",
        "warning: [one] more than usual",
    ]


def test_time_left_comes_from_the_last_iterations_and_bears_a_slow_one():
    def drive(progress: Progress) -> None:
        for iteration in range(1, 51):
            progress.update(record(iteration, seconds=100.0 if iteration < 25 or iteration % 7 == 0 else 1.0))

        progress.update(record(51, val_loss=1.0))

    assert "  0:59:59 left" in plain_lines(3650, drive)[-2]


def test_on_a_terminal_there_is_a_bar_with_lines_above():
    console = Console(file=StringIO(), force_terminal=True, width=120, _environ={"TERM": "xterm"})
    with Progress(console, 4688, 100) as progress:
        for iteration in range(101, 121):
            progress.update(record(iteration))
        progress.update(record(121, val_loss=1.5, val_perplexity=4.4817))
        progress.warn("a disk is nearly full")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("121/4,688", "loss 1.2345", "12,345 tokens/s", "0:00:00", "2:32:14 left", "━"):
        assert part in text, part
    assert "iteration 121/4,688  validation loss 1.5000  perplexity 4.48" in text
    assert "warning: a disk is nearly full" in text
    assert "iteration 105/" not in text
    assert text.endswith("\n\x1b[?25h")


def test_durations():
    assert [duration(seconds) for seconds in (0, 59.6, 3730, 360000)] == ["0:00:00", "0:01:00", "1:02:10", "100:00:00"]


# header

FACTS = Facts(
    family="llama",
    num_parameters=68_976_648_192,
    vocabulary_size=32_000,
    tp=8,
    pp=8,
    dp=2,
    micro_batch=2,
    seq=2048,
    sequence_parallel=True,
    recompute="selective",
    dtype="bf16",
    num_documents=200_000,
    num_tokens=60_000_000,
    num_trained_tokens=15_000_000,
    num_val_documents=500,
    fill=0.973,
    balance=0.991,
    epochs=3.0,
    global_batch=64,
    iterations=9375,
    start=800,
    folder=Path("checkpoints/llama-70-[b]meditron"),
    expected_seconds=3730,
)


def test_the_header_says_what_runs():
    console = Console(file=StringIO(), width=120)
    header(console, FACTS)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in (
        "llama, 69B parameters, vocabulary of 32,000",
        "128 processes = tp 8 x pp 8 x dp 2, sequence parallel on",
        "rows of 2 x 2,048 = 4,096 tokens, recompute selective, bf16",
        "200,000 documents, 60,000,000 tokens, 15,000,000 trained (25.0%); 500 documents for validation",
        "rows 97.3% full, replicas 99.1% balanced",
        "ceil(3 epochs x 200,000 documents / 64) = 9,375 iterations",
        "resuming after iteration 800, 8,575 left",
        "checkpoints/llama-70-[b]meditron",
        "about 1:02:10",
    ):
        assert part in text, part


def test_the_header_leaves_out_what_is_not_known():
    console = Console(file=StringIO(), width=120)
    unknown = replace(
        FACTS, fill=None, balance=None, expected_seconds=None, start=0, num_val_documents=0, tp=1, pp=1, dp=1
    )
    header(console, unknown)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1 process = tp 1 x pp 1 x dp 1" in text
    assert not any(part in text for part in ("full", "balanced", "duration", "resuming", "validation", "None"))


def test_iterations_are_explained():
    assert (
        iterations_text(replace(FACTS, epochs=1.0, num_documents=1, iterations=1))
        == "ceil(1 epoch x 1 document / 64) = 1 iteration"
    )
    assert (
        iterations_text(replace(FACTS, epochs=None, iterations=100))
        == "100 iterations given x 64 a batch / 200,000 documents = 0.032 epochs"
    )
