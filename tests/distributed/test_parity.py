"""In bfloat16 a run computes what a bare loop over transformers or PEFT computes: losses, norms, every parameter's
gradient and update.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import pytest
import torch

from tests.distributed import parity, reference
from tests.distributed.covering import pairs_of
from tests.distributed.launch import Died, results_of, run_chosen
from tests.distributed.parity_cases import AXES, IN_CI, ROWS, case_of, is_allowed, name_of
from tests.distributed.reference import Trained

# PEFT uses what transformers renames, and warns of tied layers, which the adapter has both of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and a tied layer:UserWarning"),
]

# A result in bfloat16 is off by up to 2^-9 of itself, and a loss is reached through about 40 of them here, which add up
# like a random walk: 2^-9 * sqrt(40) = 0.012 for what depends on a single path. Losses and norms are means over
# hundreds of tokens and thousands of weights.
LOSS, NORM = 1e-3, 1e-2
# Cosines: 1 - 0.03^2 / 2 > 0.9995 for a gradient, 1 - 0.14^2 / 2 = 0.99 for an update by Adam, which makes as much of
# small gradients.
GRADIENT, UPDATE = 0.03, 0.14
NOISE = 4.0  # or so many times what rounding does to the reference itself: in float32, in parts, with other attention
# Where there are no rotations, a bias added to all keys changes no attention: its gradient is 0, and what is found is
# rounding.
ROUNDING_ALONE = ("k_proj.bias",)
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
    case, ranks = CASES[name], results_of(results[name])
    assert "refusal" not in ranks[0], ranks[0]
    ours, theirs = parity.whole(ranks), parity.expected(case, ranks)
    others = [parity.expected(case, ranks, torch.float32)]  # from the same bfloat16 weights
    others.append(parity.expected(case, ranks, in_halves=True))
    if case["family"] != "gemma2":  # which transformers computes in one way
        others.append(parity.expected({**case, "attention": "sdpa"}, ranks))
    for number, (found, expected) in enumerate(zip(ours.records, theirs.records, strict=True)):
        for one, other, share, at in zip(found, expected, (LOSS, NORM), (0, 1), strict=True):
            noise = max(abs(run.records[number][at] - other) for run in others)
            assert abs(one - other) <= max(share * other, NOISE * noise), (number, one, other)
    rounding = {name: bound for name, bound in _rounding(theirs).items() if name.endswith(ROUNDING_ALONE)}
    rounding = {name: bound for name, bound in rounding.items() if 0 < float(theirs.gradients[name].norm()) <= bound}
    for name, bound in rounding.items():
        assert float(ours.gradients[name].norm()) <= bound, name
    _compare(
        ours.gradients,
        theirs.gradients,
        [other.gradients for other in others],
        GRADIENT,
        _rounding(theirs),
        but=rounding,
    )
    _compare(ours.updates, theirs.updates, [other.updates for other in others], UPDATE, but=rounding)
    _no_weight_stands_still(ours, theirs)


@pytest.mark.parametrize("name", IDENTICAL)
def test_the_same_arithmetic_gives_the_same_numbers(name, results):
    torch.set_num_threads(1)
    case, ranks = CASES[name], results_of(results[name])
    ours, theirs = parity.whole(ranks), parity.expected(case, ranks, kept_alone=True)
    torch.testing.assert_close(torch.tensor(ours.records), torch.tensor(theirs.records), rtol=SAME, atol=0.0)
    _compare(ours.gradients, theirs.gradients, [], 1e-3)


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


def _compare(
    found: dict[str, Any],
    expected: dict[str, Any],
    others: list[dict[str, Any]],
    share: float,
    least: Mapping[str, float] | None = None,
    but: Collection[str] = (),
) -> None:
    """Tensor by tensor: off by a share of the expected, by what the reference's own rounding makes of it, or by
    `least`.
    """
    assert found.keys() == expected.keys()
    for name in expected.keys() - but:
        theirs = expected[name]
        distance, noise = (
            float((found[name] - theirs).norm()),
            max([0.0, *(float((other[name] - theirs).norm()) for other in others)]),
        )
        bound = max(
            share * float(theirs.norm()), NOISE * noise, (least or {}).get(name, 0.0) if bool(theirs.any()) else 0.0
        )
        assert distance <= bound, (
            f"{name} is off by {distance:.2e}, more than {bound:.2e}: cosine "
            f"{reference.cosine(found[name], theirs):.4f}"
        )


def _rounding(run: Trained) -> dict[str, float]:
    """What rounding the terms of a gradient to bfloat16 makes of a sum that is 0: their size is that of all gradients
    of the model.
    """
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in run.gradients.values()))
    count = sum(gradient.numel() for gradient in run.gradients.values())
    return {name: 2**-9 * norm * math.sqrt(gradient.numel() / count) for name, gradient in run.gradients.items()}


def _no_weight_stands_still(ours: Trained, theirs: Trained) -> None:
    """Nothing that the reference trains is left out, however little it moves."""
    still = [
        name for name, update in ours.updates.items() if not bool(update.any()) and bool(theirs.updates[name].any())
    ]
    assert not still
