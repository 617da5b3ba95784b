"""Whether a run computed what the reference computes: losses, norms, every parameter's gradient and update."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from tests.distributed import parity, reference
from tests.distributed.reference import Trained

# A result in bfloat16 is off by up to 2^-9 of itself, and a loss is reached through about 40 of them here, which add up
# like a random walk: 2^-9 * sqrt(40) = 0.012 for what depends on a single path. Losses and norms are means over
# hundreds of tokens and thousands of weights.
LOSS, NORM = 1e-3, 1e-2
# Cosines: 1 - 0.03^2 / 2 > 0.9995 for a gradient, 1 - 0.14^2 / 2 = 0.99 for an update by Adam, which makes as much of
# small gradients.
GRADIENT, UPDATE = 0.03, 0.14
FEW = 0.03  # of a vector's weights may be left out
NOISE = 4.0  # or so many times what rounding does to the reference itself: in float32, in parts, with other attention
# Where there are no rotations, a bias added to all keys changes no attention: its gradient is 0, and what is found is
# rounding.
ROUNDING_ALONE = ("k_proj.bias",)


def check(case: dict[str, Any], ranks: list[Any]) -> None:
    """Against the bare loop in the run's format, allowing for what other arithmetic makes of that loop's results."""
    assert "refusal" not in ranks[0], ranks[0]
    ours, theirs = parity.whole(ranks), parity.expected(case, ranks)
    others = [parity.expected(case, ranks, torch.float32)]  # from the same bfloat16 weights
    others.append(parity.expected(case, ranks, in_halves=True))
    if case["family"] not in ("gemma2", "gpt-j"):  # which transformers computes in one way
        others.append(parity.expected({**case, "attention": "sdpa"}, ranks))
    for number, (found, expected) in enumerate(zip(ours.records, theirs.records, strict=True)):
        for one, other, share, at in zip(found, expected, (LOSS, NORM), (0, 1), strict=True):
            noise = max(abs(run.records[number][at] - other) for run in others)
            assert abs(one - other) <= max(share * other, NOISE * noise), (number, one, other)
    rounding = {name: bound for name, bound in _rounding(theirs).items() if name.endswith(ROUNDING_ALONE)}
    rounding = {name: bound for name, bound in rounding.items() if 0 < float(theirs.gradients[name].norm()) <= bound}
    for name, bound in rounding.items():
        assert float(ours.gradients[name].norm()) <= bound, name
    compare(
        ours.gradients,
        theirs.gradients,
        [other.gradients for other in others],
        GRADIENT,
        _rounding(theirs),
        but=rounding,
    )
    _no_weight_stands_still(ours, theirs)
    if not case["optimizer"].startswith("sgd"):  # whose steps are as small as the gradients
        ours, theirs, *others = (_of_known_sign(run, ours, theirs) for run in (ours, theirs, *others))
    compare(ours.updates, theirs.updates, [other.updates for other in others], UPDATE, but=rounding)


def compare(
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


def _of_known_sign(run: Trained, ours: Trained, theirs: Trained) -> Trained:
    """`run` without updates of single weights of norms and biases whose gradient is rounding alone, here and there:
    less than 2^-8 of the vector's root mean square, where each term of the sum is off by up to 2^-9 of itself.
    Optimizers that normalise make a whole step of it, in either direction.
    """
    updates = dict(run.updates)
    for name, other in theirs.gradients.items():
        if other.dim() == 1:
            least = 2**-8 * other.square().mean().sqrt()
            is_rounding = (ours.gradients[name].abs() <= least) & (other.abs() <= least) & (other != 0)
            if is_rounding.sum() <= max(1, FEW * other.numel()):
                updates[name] = updates[name].masked_fill(is_rounding, 0.0)
    return replace(run, updates=updates)


def _no_weight_stands_still(ours: Trained, theirs: Trained) -> None:
    """Nothing that the reference trains is left out, however little it moves."""
    still = [
        name for name, update in ours.updates.items() if not bool(update.any()) and bool(theirs.updates[name].any())
    ]
    assert not still
