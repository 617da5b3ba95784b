"""In bfloat16 a run computes what a bare loop over transformers or PEFT computes: losses, norms, every parameter's
gradient and update.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import parity
from tests.distributed.covering import pairs_of
from tests.distributed.launch import Died, results_of, run_chosen
from tests.distributed.parity_cases import AXES, IN_CI, ROWS, case_of, is_allowed, name_of
from tests.distributed.parity_check import check, compare

# PEFT uses what transformers renames, and warns of tied layers, which the adapter has both of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and a tied layer:UserWarning"),
]

# Where the arithmetic is the same operation by operation: one process, one document a row, the same attention kernel,
# logits of what is trained alone.
SAME = 1e-5
IDENTICAL: dict[str, dict[str, Any]] = {
    f"{family}, the same arithmetic": {
        "kind": "parity",
        "dtype": "bfloat16",
        "layers": 2,
        "iterations": 1,
        "family": family,
        "pack": False,
        "attention": "sdpa",
    }
    for family in ("llama", "gpt-neox", "qwen2")
}
CASES = {name_of(row): case_of(row) for row in ROWS} | IDENTICAL
_CI_NAMES = {name_of(row) for row in IN_CI}
PARAMETERS = [
    pytest.param(name_of(row), marks=() if name_of(row) in _CI_NAMES else (pytest.mark.slow,), id=name_of(row))
    for row in ROWS
]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any] | Died]:
    return run_chosen(request, CASES, tmp_path_factory.mktemp("parity"))


@pytest.mark.timeout(1800)  # the first of them waits for all
@pytest.mark.parametrize("name", PARAMETERS)
def test_training_in_bfloat16_is_that_of_a_bare_loop(name, results):
    torch.set_num_threads(1)
    check(CASES[name], results_of(results[name]))


@pytest.mark.parametrize("name", IDENTICAL)
def test_the_same_arithmetic_gives_the_same_numbers(name, results):
    torch.set_num_threads(1)
    case, ranks = CASES[name], results_of(results[name])
    ours, theirs = parity.whole(ranks), parity.expected(case, ranks, kept_alone=True)
    torch.testing.assert_close(torch.tensor(ours.records), torch.tensor(theirs.records), rtol=SAME, atol=0.0)
    compare(ours.gradients, theirs.gradients, [], 1e-3)


def test_the_table_covers_every_pair():
    allowed = {
        ((one, a), (other, b))
        for one in AXES
        for other in AXES
        if one < other
        for a in AXES[one]
        for b in AXES[other]
        if is_allowed({one: a, other: b})
    }
    assert allowed <= set().union(*(pairs_of(row) for row in ROWS))
    assert len(ROWS) <= 200


@pytest.mark.parametrize("axis", AXES)
def test_ci_runs_every_value_at_least_twice(axis):
    for value in AXES[axis]:
        assert sum(row[axis] == value for row in IN_CI) >= 2, value
