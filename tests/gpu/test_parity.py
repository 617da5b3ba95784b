"""On a GPU in bfloat16, a run on one process computes what a bare loop over transformers or PEFT computes there: every
family, kind of training, optimizer and way of recomputing, with compiled layers and without.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed.launch import Died, results_of, run_cases
from tests.distributed.parity_cases import AXES, MODES
from tests.distributed.parity_check import check
from tests.models import FAMILIES

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and a tied layer:UserWarning"),
]
_WIDE = {"hidden_size": 64}  # heads of 16: the kernels for packed rows take them in steps of 8
_COMMON = {"kind": "parity", "dtype": "bfloat16", "layers": 2, "iterations": 3, "sizes": _WIDE}


def _cases() -> dict[str, dict[str, Any]]:
    """Every value of each axis, not every combination."""
    cases = {family: {"family": family} for family in sorted(FAMILIES)}
    for mode, flags in MODES.items():
        if mode != "adapters, saved":
            cases[f"llama, {mode}"] = {"family": "llama", **flags}
    cases["llama, adapters, saved"] = {
        "family": "llama",
        "lora": {"modules_to_save": ["embed_tokens", "lm_head", "model.norm"]},
    }
    for optimizer in AXES["optimizer"]:
        cases[f"llama, {optimizer}"] = {"family": "llama", "optimizer": optimizer}
    for recompute in AXES["recompute"]:
        for compiled in (False, True):
            cases[f"qwen3, recompute {recompute}{', compiled' if compiled else ''}"] = {
                "family": "qwen3",
                "recompute": recompute,
                "compile": compiled,
            }
    for family in ("gpt-neox", "mistral-window", "gemma3", "opt", "phi3", "olmo2", "granite"):
        cases[f"{family}, compiled"] = {"family": family, "compile": True}
    cases["llama, adapters, compiled"] = {"family": "llama", "lora": {}, "compile": True}
    cases["llama3-tied, loss_mask"] = {"family": "llama3-tied", "loss_mask": 0.5}
    return {name: {**_COMMON, **case} for name, case in cases.items()}


CASES = _cases()
_STARTS = 10  # of workers, each with a share of the cases: starting one takes longer than a case
SHARES = [list(CASES)[start::_STARTS] for start in range(_STARTS)]
PARAMETERS = [
    pytest.param(name, marks=pytest.mark.xdist_group(f"share {number}"))
    for number, names in enumerate(SHARES)
    for name in names
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any] | Died]:
    done: dict[str, list[Any] | Died] = {}

    def result(name: str) -> list[Any] | Died:
        if name not in done:
            names = [other for other in next(share for share in SHARES if name in share) if _can_run(CASES[other])]
            found = run_cases(1, [CASES[one] for one in names], tmp_path_factory.mktemp("parity"), case_seconds=120)
            done.update(zip(names, found, strict=True))
        return done[name]

    return result


@pytest.mark.parametrize("name", PARAMETERS)
def test_training_on_a_gpu_is_that_of_a_bare_loop(name, results):
    torch.set_num_threads(1)
    if not _can_run(CASES[name]):
        pytest.skip("bitsandbytes is not installed")
    check(CASES[name], results_of(results(name)))


def _can_run(case: dict[str, Any]) -> bool:
    needs = "bits" in case or case.get("optimizer") == "adamw8bit"
    return not needs or importlib.util.find_spec("bitsandbytes") is not None
