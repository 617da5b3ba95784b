"""A pipeline of p stages waits for (p - 1) / (m + p - 1) of an iteration of m micro-batches, and no longer."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.bubble import time_of
from tests.distributed.launch import Died, results_of, run_chosen

CASES: dict[str, dict[str, Any]] = {
    f"pp{pp}, {documents} rows": {
        "kind": "bubble",
        "family": "llama",
        "layers": 4,
        "pp": pp,
        "micro_batch": 1,
        "pack": False,
        "global_batch": documents,
    }
    for pp, documents in ((2, 4), (4, 12))
}


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any] | Died]:
    return run_chosen(request, CASES, tmp_path_factory.mktemp("bubble"))


@pytest.mark.parametrize("name", ["pp2, 4 rows", pytest.param("pp4, 12 rows", marks=pytest.mark.slow)])
def test_a_pipeline_waits_as_long_as_its_schedule_says(name, results):
    pp, micro_batches = CASES[name]["pp"], CASES[name]["global_batch"]
    ranks = sorted(results_of(results[name]), key=lambda rank: rank["stage"])
    assert {rank["micro_batches"] for rank in ranks} == {micro_batches}
    assert all(sorted(rank["turns"]) == sorted("FB" * micro_batches) for rank in ranks)
    taken = time_of([rank["turns"] for rank in ranks])
    assert 1 - 3 * micro_batches / taken == pytest.approx((pp - 1) / (micro_batches + pp - 1))


def test_the_time_of_a_schedule_in_which_nothing_overlaps():
    assert time_of(["FBFBFB", "FBFBFB"]) == 3 * (3 + 3)
    assert time_of(["FFBFBB", "FBFBFB"]) == 3 * (3 + 1)
