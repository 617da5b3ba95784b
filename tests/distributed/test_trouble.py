"""Numbers that are not finite stop every process before an update; bfloat16 trains with float32 masters; what hangs is
ended and told.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import worker
from tests.distributed.data import MemoryReader
from tests.distributed.launch import Died, results_of, run_cases, run_chosen
from tests.distributed.trouble import POISONED_RANK

# Against the same run on one process. Measured: 2e-5 for losses, 6e-4 for gradient norms.
BFLOAT16_TOLERANCE = 5e-3
TINY_RATE = 2e-6

_LLAMA: dict[str, Any] = {"family": "llama", "layers": 2}
NOT_FINITE: dict[str, dict[str, Any]] = {
    "a parameter, tp2 x pp2": {"poison": "parameter", "tp": 2, "pp": 2, "sequence_parallel": True},
    "a parameter, pp2 x dp2": {"poison": "parameter", "pp": 2, "dp": 2},
    "a loss, pp2 x dp2": {"poison": "loss", "pp": 2, "dp": 2},
    "a loss, tp2 x dp2": {"poison": "loss", "tp": 2, "dp": 2},
    "a gradient, tp2 x pp2": {"poison": "gradient", "tp": 2, "pp": 2},
    "a gradient, dp4": {"poison": "gradient", "dp": 4, "micro_batch": 1},
    "a gradient, dp4, bfloat16": {"poison": "gradient", "dp": 4, "micro_batch": 1, "dtype": "bfloat16"},
}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"kind": "not_finite", **_LLAMA, **case} for name, case in NOT_FINITE.items()},
    "bfloat16, one": {**_LLAMA, "dtype": "bfloat16"},
    "bfloat16, tp2 x pp2": {**_LLAMA, "dtype": "bfloat16", "tp": 2, "pp": 2, "sequence_parallel": True},
    "masters, one": {"kind": "masters", **_LLAMA, "dtype": "bfloat16", "lr": TINY_RATE},
    "masters, dp2 x tp2": {"kind": "masters", **_LLAMA, "dtype": "bfloat16", "lr": TINY_RATE, "dp": 2, "tp": 2},
}


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any] | Died]:
    return run_chosen(request, CASES, tmp_path_factory.mktemp("trouble"))


@pytest.mark.parametrize("name", NOT_FINITE)
def test_what_is_not_finite_stops_every_process_before_the_update(name, results):
    ranks = results_of(results[name])
    message = ranks[0]["error"]
    what = "gradient" if CASES[name]["poison"] == "gradient" else "loss"
    assert message.startswith(f"the {what} is not a finite number in iteration 2, which was not applied; documents "), (
        message
    )
    assert message.endswith("look at them with `sft inspect --row`, or use a smaller --lr"), message
    for rank in ranks:
        assert rank["error"] == message
        assert rank["changed"] == []
    named = _named(message)
    rows = {rank["replica"]: rank["rows"] for rank in ranks}
    if CASES[name]["poison"] == "loss":
        assert named == sorted(rows[1][1])
        assert " and " not in message
    else:
        replicas = [ranks[POISONED_RANK]["replica"]] if name == "a parameter, pp2 x dp2" else list(rows)
        everything = sorted({document for replica in replicas for row in rows[replica] for document in row})
        assert named == everything[:10]
        assert (f" and {len(everything) - 10} more: " in message) == (len(everything) > 10)


@pytest.mark.parametrize(("name", "alone"), [("bfloat16, tp2 x pp2", "bfloat16, one")])
def test_bfloat16_gives_like_losses_on_any_layout(name, alone, results):
    (one,) = results_of(results[alone])
    expected = torch.tensor(one["records"])
    assert torch.isfinite(expected).all()
    for rank in results_of(results[name]):
        torch.testing.assert_close(torch.tensor(rank["records"]), expected, rtol=BFLOAT16_TOLERANCE, atol=0.0)
        assert all(weight.dtype is torch.bfloat16 for _, weight in rank["weights"].values())


@pytest.mark.parametrize("name", ["masters, one", "masters, dp2 x tp2"])
def test_updates_below_bfloat16s_resolution_add_up(name, results):
    """A rate of 2e-6 moves no bfloat16 weight of size 0.1, whose neighbours are 5e-4 away; its float32 master moves
    each time.
    """
    for rank in results_of(results[name]):
        weights, masters = (torch.stack(values) for values in zip(*rank["history"], strict=True))
        assert weights.dtype is torch.bfloat16
        assert masters.dtype is torch.float32
        torch.testing.assert_close(masters[0], weights[0].float(), rtol=0.0, atol=0.0)
        torch.testing.assert_close(masters[-1].bfloat16(), weights[-1], rtol=0.0, atol=0.0)
        usual = weights[0].abs() > 0.05
        assert torch.equal(weights[-1][usual], weights[0][usual])
        moved = (masters - masters[0])[:, usual].abs().amax(1)
        assert (moved.diff() > 0).all(), moved
        assert TINY_RATE * 1.5 < float(moved[-1]) < TINY_RATE * worker.ITERATIONS, moved


def test_a_hanging_run_is_ended_with_every_ranks_stack(tmp_path):
    (result,) = run_cases(
        2, [{"kind": "hang"}], tmp_path, case_seconds=10, starts=1
    )  # time enough to come to the barrier
    assert isinstance(result, Died)
    assert "rank 0 hung here:" in result.report
    assert "rank 1 hung here:" in result.report
    assert "in barrier" in result.report
    assert "in hang" in result.report


def _named(message: str) -> list[int]:
    listing = message.partition("documents ")[2].partition(":")[0].partition(" and ")[0]
    places = [part.split(" ", 1) for part in listing.split(", ")]
    reader = MemoryReader(worker.DOCUMENTS, 131, worker.SEQ)
    assert all(place == "({} line {})".format(*reader.place(int(number))) for number, place in places), message
    return [int(number) for number, _ in places]
