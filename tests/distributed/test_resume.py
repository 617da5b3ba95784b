"""Training that was interrupted goes on as if it had not been: bit by bit with the same layout, within rounding with
any other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from sft.checkpoint.fragments import Checkpoint
from sft.optimizer.states import MASTER
from tests.distributed.resume_worker import ITERATIONS, SAVED_AFTER, saved

pytestmark = pytest.mark.timeout(3600)  # the first test waits for all processes

ROOT = Path(__file__).parents[2]
# Written by: (layout, options). Names of layouts are tp, pp, dp.
WRITERS: dict[str, dict[str, Any]] = {
    "tied-122": {"family": "llama3-tied"},
    "tied-221": {"family": "llama3-tied"},
    "llama-411": {"family": "llama", "sequence_parallel": True},
    "llama-212": {"family": "llama"},
    "llama-bf16-212": {"family": "llama", "dtype": "bfloat16"},
    "tied-bf16-122": {"family": "llama3-tied", "dtype": "bfloat16"},
    "phi3-212": {"family": "phi3", "layers": 2},
    "opt-221": {"family": "opt-350m", "layers": 2},
    "sgd-122": {"family": "llama", "layers": 2, "optimizer": "sgd"},
    "neox-111": {"family": "gpt-neox", "layers": 2},
    "8bit-112": {"family": "llama", "layers": 2, "optimizer": "adamw8bit"},
    "adafactor-112": {"family": "llama", "layers": 2, "optimizer": "adafactor"},
    "muon-212": {"family": "llama3-tied", "layers": 2, "optimizer": "muon"},
    "momentum-121": {"family": "llama", "layers": 2, "optimizer": "sgd, momentum"},
    "lora-221": {"family": "llama", "layers": 2, "lora": {"modules_to_save": ["model.norm"]}},
    "lora8-121": {"family": "llama3-tied", "layers": 2, "bits": 8, "lora": {"dropout": 0.1}},
}
# Resumed with: other layouts than the writer's own.
READERS: dict[str, list[str]] = {
    "tied-122": ["111", "221", "141", "121"],
    "tied-221": ["114", "211"],
    "llama-411": ["111", "221", "212"],
    "llama-212": ["411", "112"],
    "phi3-212": ["121", "122", "111"],
    "opt-221": ["111", "122", "112"],
    "sgd-122": ["211"],
    "neox-111": ["221", "114"],
    "adafactor-112": ["111", "221"],
    "muon-212": ["111", "122"],
    "momentum-121": ["112"],
    "lora-221": ["121"],
    "lora8-121": ["111"],
}

STATES: dict[str, tuple[str, ...]] = {
    "sgd": (),
    "sgd, momentum": ("momentum_buffer",),
    "muon": ("exp_avg", "exp_avg_sq", "momentum_buffer"),
    "adafactor": ("exp_avg_sq", "exp_avg_sq_col", "exp_avg_sq_row"),
}
# Muon makes a matrix orthogonal in bfloat16, where the last bit of a float32 sum can decide how a number is rounded.
ROUNDING = {"muon": 1e-4}


def _case(name: str, layout: str, **options: Any) -> dict[str, Any]:
    tp, pp, dp = map(int, layout)
    return {"name": name, "tp": tp, "pp": pp, "dp": dp, **options}


def _cases() -> list[dict[str, Any]]:
    """Those that save, then those that go on."""
    writing, reading = [_case("unsaved-122", "122", family="llama3-tied", unsaved=True)], []
    for name, options in WRITERS.items():
        own = name.rpartition("-")[2]
        writing.append(_case(name, own, **options))
        reading.append(_case(f"{name}-same", own, resume=name, same=True, **options))
        others = {key: value for key, value in options.items() if key != "sequence_parallel"}
        reading += [_case(f"{name}-as-{other}", other, resume=name, **others) for other in READERS.get(name, [])]
    return writing + reading


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One torchrun for each number of processes, at once. Who goes on from another's checkpoint waits for it."""
    folder, cases = tmp_path_factory.mktemp("resume"), _cases()

    def torchrun(world: int) -> None:
        file = folder / f"cases-{world}.json"
        file.write_text(json.dumps([case for case in cases if case["tp"] * case["pp"] * case["dp"] == world]))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "-m", "tests.distributed.resume_worker", str(file), str(folder)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=1500,
            cwd=ROOT,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-6000:]

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(torchrun, (4, 2, 1)))
    return folder


@pytest.fixture(scope="module")
def result(results: Path) -> Callable[[str], dict[str, Any]]:
    return lambda name: json.loads((results / f"{name}-0.json").read_text())


@pytest.mark.parametrize("name", WRITERS)
def test_same_layout_goes_on_bit_by_bit(results: Path, result: Any, name: str) -> None:
    assert result(f"{name}-same")["losses"] == result(name)["losses"][SAVED_AFTER:]
    for file in results.glob(f"{name}-same-?.json"):
        assert json.loads(file.read_text())["differ"] == [], file.name


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name, layouts in READERS.items() for layout in layouts]
)
def test_other_layouts_go_on_within_rounding(results: Path, result: Any, name: str, layout: str) -> None:
    ours, theirs = (
        torch.tensor(result(f"{name}-as-{layout}")["losses"]),
        torch.tensor(result(name)["losses"][SAVED_AFTER:]),
    )
    torch.testing.assert_close(ours[:, 0], theirs[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours[:, 1], theirs[:, 1], rtol=1e-5, atol=0)
    resumed, whole = (Checkpoint(saved(results, run, ITERATIONS)) for run in (f"{name}-as-{layout}", name))
    assert sorted(resumed.names()) == sorted(whole.names())
    assert resumed.manifest["optimizer_step"] == whole.manifest["optimizer_step"]
    for parameter in whole.names():
        expected = whole.read(parameter, MASTER)
        rounding = ROUNDING.get(WRITERS[name].get("optimizer", ""), 1e-6)
        assert (resumed.read(parameter, MASTER) - expected).norm() <= rounding * expected.norm(), parameter


def test_saving_in_the_background_changes_nothing(result: Any) -> None:
    assert result("tied-122")["losses"] == result("unsaved-122")["losses"]


def test_what_is_written_has_no_pickle_and_nothing_twice(results: Path) -> None:
    for name, options in WRITERS.items():
        checkpoint = Checkpoint(saved(results, name))
        assert {file.suffix for file in checkpoint.folder.iterdir()} == {".json", ".safetensors"}
        assert checkpoint.states() == [
            MASTER,
            *STATES.get(options.get("optimizer", "adamw"), ("exp_avg", "exp_avg_sq")),
        ]
        assert checkpoint.manifest["optimizer_step"] == SAVED_AFTER
        trains_head = options["family"] not in ("llama3-tied", "opt-350m") and "lora" not in options
        assert ("lm_head.weight" in checkpoint.names()) == trains_head
    sizes = [
        sum(file["bytes"] for file in Checkpoint(saved(results, name)).manifest["files"])
        for name in ("tied-122", "tied-bf16-122")
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
