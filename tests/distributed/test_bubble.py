"""A pipeline of p stages waits for (p - 1) / (m + p - 1) of an iteration of m micro-batches, and no longer."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.launch import Died, results_of, run_chosen

TOLERANCE = 0.10
CASES: dict[str, dict[str, Any]] = {
    f"pp{pp}, {documents} rows": {
        "kind": "bubble", "family": "llama", "layers": 4, "pp": pp, "micro_batch": 1, "pack": False, "global_batch": documents,
    }
    for pp, documents in ((2, 4), (4, 12))
}  # fmt: skip


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any] | Died]:
    return run_chosen(request, CASES, tmp_path_factory.mktemp("bubble"))


@pytest.mark.parametrize("name", ["pp2, 4 rows", pytest.param("pp4, 12 rows", marks=pytest.mark.slow)])
def test_a_pipeline_waits_as_long_as_its_schedule_says(name, results):
    pp = CASES[name]["pp"]
    ranks = results_of(results[name])
    micro_batches = CASES[name]["global_batch"]
    assert {rank["micro_batches"] for rank in ranks} == {micro_batches}
    waited = 1 - micro_batches / ranks[0]["turns"]
    assert waited == pytest.approx((pp - 1) / (micro_batches + pp - 1), rel=TOLERANCE)
