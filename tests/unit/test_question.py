"""Orders, preferences, and the plan: which layout a run gets on how many processes, and how many documents its
iterations have.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sft.cli import entry
from sft.config.settings import Settings
from sft.plan.gpus import TABLE
from sft.resolve import planning
from sft.resolve.run import resolve
from sft.resolve.summary import facts_of
from tests.conftest import Workbench, pair
from tests.packaged import ENTRIES, write_packaged
from tests.unit.test_plan_command import BaseStub
from tests.unit.test_plan_search import LLAMA_8B, LLAMA_70B


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packaged(tmp_path_factory.mktemp("packaged"))


def plan(capsys: pytest.CaptureFixture[str], packaged: Path, *arguments: Any) -> tuple[int, Any]:
    """(the exit code, the plan, or what was said instead)."""
    capsys.readouterr()
    given = ["--checkpoints_file", packaged, "--gpu", "h100-80gb", "--iters", "9", "--json", *arguments]
    code = entry(["plan", *map(str, given)])
    said = capsys.readouterr()
    return code, json.loads(said.out) if code == 0 else said.err


def on(world: int) -> list[str]:
    return ["--nproc_per_node", str(min(world, 8)), "--nodes", str(max(1, world // 8))]


@pytest.mark.parametrize("world", [1, 2, 4, 8, 64])
@pytest.mark.parametrize(("name", "size"), ENTRIES)
def test_every_packaged_entry_plans_or_says_what_is_too_small(packaged, capsys, name, size, world):
    code, found = plan(capsys, packaged, "--checkpoint", name, "--size", size, *on(world))
    if code:
        assert code == 2
        assert found.count("\n") == 1
        assert re.search(
            rf"does not fit: [\d,.e+]+ GB on stage \d+ of [\d.]+ GB .*; no layout on {world} fits: \d+ GPUs do, with",
            found,
        ), found
        return
    entries = {"7": (4, 1), "13": (8, 1), "70": (8, 8), "8": (4, 1)}
    tp, pp = (1, 1) if name in ("pythia", "opt", "smollm2") or (name, size) == ("gemma", "2") else entries[size]
    assert found["tp"] * found["pp"] * found["dp"] == world
    if world % (tp * pp) == 0:
        assert (found["tp"], found["pp"]) == (tp, pp)
        assert not any("instead" in note for note in found["notes"])
    else:
        there = "is 1" if world == 1 else f"are {world}"
        used = f"using tp {found['tp']} x pp {found['pp']} instead"
        assert (
            f"the entry's tp {tp} x pp {pp} needs a multiple of {tp * pp} processes, and there {there}: {used}"
            in found["notes"]
        )


def test_typed_sizes_are_orders(packaged, capsys):
    code, found = plan(capsys, packaged, "--checkpoint", "llama3", "--size", "8", "--tp", "4", *on(2))
    assert code == 2
    assert "tp 4 x pp 1 needs a multiple of 4 processes, but 2 would start" in found
    code, found = plan(capsys, packaged, "--checkpoint", "llama3", "--size", "70", "--tp", "4", *on(64))
    assert (code, found["tp"]) == (0, 4), found
    assert found["pp"] == 8  # the entry's


def test_a_preference_that_does_not_fit_the_memory_is_left(packaged, capsys, tmp_path):
    small = ["--checkpoint", "smollm2", "--size", "135m", *on(2)]
    _, found = plan(capsys, packaged, *small, "--tp", "1", "--pp", "1", "--micro_batch", "1", "--recompute", "full")
    toy = tmp_path / "gpus.toml"
    toy.write_text(
        f'[toy]\nlike = "h100-80gb"\nmemory_gb = {found["peak_gb"] - 0.3}\nreserved_gb = 0\nspare = '
        "0\ncommunicator_gb = 0\n"
    )
    code, found = plan(capsys, packaged, *small, "--gpu_file", toy, "--gpu", "toy")
    assert code == 0, found
    assert (found["tp"], found["pp"]) != (1, 1)
    assert any(
        note.startswith("the entry's tp 1 x pp 1 does not fit into the memory of these GPUs: using tp")
        for note in found["notes"]
    )


@pytest.mark.parametrize(
    ("arguments", "batch"),
    [
        (["--checkpoint", "meditron", "--size", "70", *on(64)], 4),  # of its entry: tp 8 x pp 8
        (["--checkpoint", "meditron", "--size", "70", *on(128)], 8),
        (["--checkpoint", "llama3", "--size", "8", *on(8)], 8),  # tp 4
        (["--checkpoint", "llama3", "--size", "8", "--micro_batch", "2", *on(8)], 16),
        (["--checkpoint", "llama3", "--size", "8", "--tp", "8", *on(8)], 4),
        (["--checkpoint", "smollm2", "--size", "135m", *on(8)], 32),
    ],
)
def test_accumulation_counts_the_layout_that_is_used(packaged, capsys, arguments, batch):
    code, found = plan(capsys, packaged, "--gradient_accumulation", "4", *arguments)
    assert code == 0, found
    assert found["global_batch"] == batch
    rows = 2 if "--micro_batch" in arguments else 1
    assert (
        f"{batch} documents an iteration = gradient_accumulation 4 x micro_batch {rows} x dp {found['dp']}"
        in found["notes"]
    )


@pytest.mark.parametrize("world", [1, 2, 8, 16, 48])
def test_accumulation_counts_the_layout_that_the_plan_chooses(packaged, capsys, tmp_path, world):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    code, found = plan(capsys, packaged, "--checkpoint", tmp_path, "--gradient_accumulation", "4", *on(world))
    if code:
        assert f"no layout on {world} fits" in found
    else:
        assert found["global_batch"] == 4 * found["dp"]


@pytest.fixture
def tokenised(bench: Workbench, tmp_path: Path) -> Settings:
    bench.tokenize("--data", bench.jsonl([pair(f"Number {i}?", f"It is {i}.") for i in range(80)]))
    return Settings.of(
        run_name="r",
        tokenized_data_dir=str(bench.tokenized),
        checkpoint=str(bench.base),
        save_checkpoint_dir=str(tmp_path),
    )


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int, gpu: str | None = "h100-80gb") -> None:
    for module in ("sft.resolve.planning", "sft.resolve.run", "sft.resolve.summary"):
        monkeypatch.setattr(f"{module}.visible_gpus", lambda: count)
    monkeypatch.setattr(planning, "local_gpu", lambda table: None if gpu is None else TABLE[gpu])


@pytest.mark.parametrize("gpu", ["h100-80gb", None])
def test_training_counts_the_same(tokenised, monkeypatch, gpu):
    with_gpus(monkeypatch, 8, gpu)
    base: Any = BaseStub(LLAMA_70B, tp=8, pp=8)
    asked = tokenised.replace(gradient_accumulation=4, nodes=8)
    job = resolve(asked, base)
    assert (str(job.layout), job.settings.schedule.global_batch, job.settings.schedule.gradient_accumulation) == (
        "tp 8 x pp 8 x dp 1",
        4,
        None,
    )
    assert job.iterations == 3 * 80 // 4
    assert facts_of(job).global_batch == 4
    again = resolve(asked.replace(gradient_accumulation=None, global_batch=4, tp=8, pp=8), base)
    assert (again.layout, again.micro_batch, again.recompute) == (job.layout, job.micro_batch, job.recompute)


def test_fewer_replicas_keep_the_documents_of_an_iteration(tokenised, monkeypatch):
    with_gpus(monkeypatch, 8)
    base: Any = BaseStub(LLAMA_8B, tp=4, pp=1)
    decided = resolve(tokenised.replace(gradient_accumulation=4, nodes=2), base)
    assert (decided.layout.dp, decided.settings.schedule.global_batch) == (4, 16)
    fewer = resolve(decided.asked.replace(nodes=1), base)
    assert (fewer.layout.dp, fewer.settings.schedule.global_batch) == (2, 16)


@pytest.mark.parametrize(
    ("world", "layout"), [(64, "tp 8 x pp 8 x dp 1"), (8, "tp 8 x pp 1 x dp 1"), (2, "tp 2 x pp 1 x dp 1")]
)
def test_on_gpus_that_nobody_knows_the_nearest_to_the_preference_is_used(tokenised, monkeypatch, world, layout):
    with_gpus(monkeypatch, world, None)
    base: Any = BaseStub(LLAMA_70B, tp=8, pp=8)
    job = resolve(tokenised, base)
    assert str(job.layout) == layout
    used = layout.rpartition(" x dp")[0]
    note = f"the entry's tp 8 x pp 8 needs a multiple of 64 processes, and there are {world}: using {used} instead"
    assert facts_of(job).layout_note == ("" if world == 64 else note)


def test_on_a_cpu_the_simplest_is_used_where_the_preference_does_not_fit(tokenised):
    base: Any = BaseStub(
        LLAMA_8B | {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 999}, tp=4, pp=1
    )
    alone = resolve(tokenised, base)
    assert str(alone.layout) == "tp 1 x pp 1 x dp 1"
    assert (
        facts_of(alone).layout_note
        == "the entry's tp 4 x pp 1 needs a multiple of 4 processes, and there is 1: using tp 1 x pp 1 instead"
    )
    assert str(resolve(tokenised.replace(nproc_per_node=4), base).layout) == "tp 4 x pp 1 x dp 1"
