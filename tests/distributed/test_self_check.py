"""Before a run, the ranks that share tensors check together that what they compute is what transformers computes."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sft.verify.selfcheck import TOLERANCE
from tests.distributed.launch import Died, results_of, run_chosen
from tests.models import FAMILIES

# What --tp 4 cannot split: query, key and value in one layer, or normed together, with two key-value heads.
REFUSED_AT_4 = ("falcon-new", "olmo2", "phi3")
# Mistake: the family it is put into, are tokens split over ranks, what is said to be off.
_ANYWHERE = r"(losses|gradient of [\w.]+)"
MISTAKES = {
    "norm": ("qwen3", True, _ANYWHERE),
    "bias": ("llama-biases", False, _ANYWHERE),
    "halves": ("phi3", False, _ANYWHERE),
}


def _cases() -> dict[str, dict[str, Any]]:
    """All in worlds of four: with two ranks that share tensors, two pairs check the same."""
    layouts = {"tp2": {"tp": 2, "dp": 2}, "tp4": {"tp": 4}}
    cases = {
        f"{family}, {tp}{', stretches' if stretches else ''}": {
            "family": family,
            **layout,
            "sequence_parallel": stretches,
        }
        for family in FAMILIES
        for tp, layout in layouts.items()
        for stretches in (False, True)
        if family in ("llama-biases", "gpt-neox") or stretches == (tp == "tp2")
    }
    for mistake, (family, stretches, _) in MISTAKES.items():
        cases[f"{mistake} wrong, tp2"] = {
            "family": family,
            "tp": 2,
            "dp": 2,
            "sequence_parallel": stretches,
            "mistake": mistake,
        }
        if family not in REFUSED_AT_4:
            cases[f"{mistake} wrong, tp4"] = {
                "family": family,
                "tp": 4,
                "sequence_parallel": stretches,
                "mistake": mistake,
            }
    cases["one rank wrong, tp2"] = {"family": "llama", "tp": 2, "dp": 2, "mistake": "one rank"}
    return {name: {"kind": "self_check", **case} for name, case in cases.items()}


CASES = _cases()
_REFUSED = [name for name, case in CASES.items() if case["family"] in REFUSED_AT_4 and case["tp"] == 4]
_WRONG = [name for name, case in CASES.items() if case.get("mistake") in MISTAKES]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any] | Died]:
    return run_chosen(request, CASES, tmp_path_factory.mktemp("self_check"))


@pytest.mark.parametrize("name", [name for name in CASES if name not in _REFUSED and "mistake" not in CASES[name]])
def test_ranks_together_compute_what_transformers_computes(name, results):
    for rank in results_of(results[name]):
        assert rank["worst"] <= TOLERANCE


@pytest.mark.parametrize("name", _WRONG)
def test_a_mistake_is_refused_on_every_rank(name, results):
    case = CASES[name]
    where = MISTAKES[case["mistake"]][2]
    for rank in results_of(results[name]):
        assert re.fullmatch(
            rf"\w+ split into stages at tp {case['tp']} does not compute what transformers computes "
            rf"\({where}: off by \d\.\de-\d\d\): it cannot be trained here yet; use a base model of another family or "
            r"--tp 1",
            rank.get("refusal", f"it passed: {rank}"),
        )


@pytest.mark.parametrize("name", ["one rank wrong, tp2"])
def test_a_mistake_on_one_rank_is_refused_on_all_that_share_its_tensors(name, results):
    ranks = results_of(results[name])
    assert ["refusal" in rank for rank in ranks] == [True, True, False, False]
    assert ranks[0]["refusal"] == ranks[1]["refusal"]


@pytest.mark.parametrize("name", _REFUSED)
def test_heads_that_ranks_cannot_share_are_refused(name, results):
    for rank in results_of(results[name]):
        assert rank["refusal"] == "--tp 4 does not divide 4 heads and 2 key-value heads: use --tp 1, 2"
