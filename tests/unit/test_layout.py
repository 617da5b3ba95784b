"""Layouts that fit, layouts that are refused and what to do instead, and the learning rate of an iteration."""

from __future__ import annotations

import re

import pytest
import torch

from sft.model.build import build_stage
from sft.model.collectives import SingleRank
from sft.plan.layout import Layout, ModelShape, choose_layout
from sft.plan.schedule import in_words, learning_rate
from tests.models import FAMILIES, tiny_config
from tokenize_data.errors import UserError

LLAMA = ModelShape(kind="llama", layers=4, heads=8, key_value_heads=2, intermediate=96)


def choose(world, tp=None, pp=None, *, shape=LLAMA, sequence_parallel=None, global_batch=64):
    return choose_layout(world, shape, tp=tp, pp=pp, sequence_parallel=sequence_parallel, global_batch=global_batch)


def test_what_is_not_given_is_data_parallel():
    assert choose(4) == Layout(dp=4)
    assert choose(8, tp=2, pp=2) == Layout(tp=2, pp=2, dp=2, sequence_parallel=True)
    assert choose(8, tp=2, sequence_parallel=False) == Layout(tp=2, dp=4)
    assert choose(2, pp=2, sequence_parallel=True) == Layout(pp=2)
    assert choose(8, tp=8).tp == 8  # each key-value head on four ranks
    assert (str(Layout(tp=2, pp=3, dp=4)), Layout(tp=2, pp=3, dp=4).world) == ("tp 2 x pp 3 x dp 4", 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"world": 6, "tp": 2, "pp": 2},
            "tp 2 x pp 2 needs a multiple of 4 processes, but 6 would start: start 4 or more "
            "(--nproc_per_node, --nodes), or use a tp * pp of 1, 2, 3, 6",
        ),
        (
            {"world": 3, "global_batch": 64},
            "global_batch 64 is not divisible by dp 3: use dp 1, 2, 4, 8, 16, 32, 64, or a global_batch of 3, 6, ...",
        ),
        ({"world": 5, "pp": 5}, "--pp 5 is more stages than the 4 layers of this llama model: use --pp 1 to 4"),
        (
            {"world": 3, "tp": 3},
            "--tp 3 does not divide this llama model's 8 heads, 2 key-value heads and 96 inner features: "
            "use --tp 1, 2, 4, 8",
        ),
        (
            {"world": 3, "tp": 3, "shape": ModelShape(kind="odd", heads=8, key_value_heads=8)},
            "--tp 3 does not divide this odd model's 8 heads and 8 key-value heads: use --tp 1, 2, 4, 8",
        ),
        (
            {"world": 4, "tp": 4, "shape": ModelShape(kind="llama", heads=8, key_value_heads=8, intermediate=98)},
            "--tp 4 does not divide this llama model's 8 heads, 8 key-value heads and 98 inner features: use --tp 1, 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(arguments, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        choose(**arguments)


def test_unknown_shapes_are_left_to_the_model():
    assert choose(8, tp=8, shape=ModelShape(kind="new")).tp == 8


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_a_layout_is_refused_before_a_process_starts_where_the_model_would_refuse_it(family, tp):
    """The shape in config.json and the model itself agree."""
    config = tiny_config(family)
    refused = []
    for build in (
        lambda: choose(tp, tp=tp, shape=ModelShape.of_config(config.to_dict()), global_batch=12),
        lambda: build_stage(
            config,
            range(4),
            SingleRank(rank=0, size=tp),
            sequence_parallel=False,
            recompute="none",
            dtype=torch.float32,
            device=torch.device("cpu"),
        ),
    ):
        try:
            build()
            refused.append("")
        except UserError as error:
            refused.append(str(error))
    by_plan, by_model = refused
    if by_model:
        assert by_model.partition(": use ")[2] == by_plan.partition(": use ")[2] or tp == 3
    if by_plan:
        assert by_plan.startswith(f"--tp {tp} does not divide this {config.model_type} model's 4 heads, ")
    assert bool(by_plan) == (tp == 3 or (tp == 4 and family in ("phi3", "olmo2", "falcon-new")))
    assert bool(by_model) == bool(by_plan) or (family, tp) == (
        "falcon",
        3,
    )  # all ranks compute its attention: heads need not fit


def test_shapes_under_the_names_that_families_use():
    falcon = {"model_type": "falcon", "n_layer": 3, "n_head": 6, "n_head_kv": 2, "ffn_hidden_size": 24}
    assert ModelShape.of_config(falcon) == ModelShape(
        kind="falcon", layers=3, heads=6, key_value_heads=2, intermediate=24
    )
    assert ModelShape.of_config({"num_attention_heads": 4}) == ModelShape(kind="unknown", heads=4, key_value_heads=4)


def rates(schedule, *, iterations=10, warmup_fraction=0.2, min_lr=0.1):
    rate = {"lr": 1.0, "min_lr": min_lr, "warmup_fraction": warmup_fraction, "schedule": schedule}
    return [learning_rate(iteration, iterations, **rate) for iteration in range(1, iterations + 1)]


def test_rates_rise_and_then_fall_to_the_least_at_the_last_iteration():
    for schedule in ("linear", "cosine"):
        found = rates(schedule)
        assert found[:2] == [0.5, 1.0]
        assert found[2:] == sorted(found[2:], reverse=True)
        assert found[-1] == pytest.approx(0.1)
    assert rates("linear")[2:] == pytest.approx([1.0 - 0.9 * k / 8 for k in range(1, 9)])
    assert rates("cosine")[5] == pytest.approx(0.55)
    assert rates("constant") == [0.5] + [1.0] * 9


def test_rates_of_short_runs_and_without_warmup():
    assert rates("linear", warmup_fraction=0.0)[0] == pytest.approx(0.91)
    assert rates("cosine", iterations=1, warmup_fraction=0.0) == pytest.approx([0.1])
    assert rates("cosine", iterations=1, warmup_fraction=0.01) == [1.0]
    assert rates("constant", iterations=3, warmup_fraction=1.0) == pytest.approx([1 / 3, 2 / 3, 1.0])
    with pytest.raises(AssertionError):
        learning_rate(0, 10, lr=1.0, min_lr=0.0, warmup_fraction=0.0, schedule="linear")


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("cosine", "rises to 2e-05 over 10 iterations, then cosine to 2e-06"),
        ("constant", "rises to 2e-05 over 10 iterations, then constant"),
        ("cosine_with_restarts", "then cosine to 2e-06 in 3 cycles"),
        ("polynomial", "then polynomial of power 2 to 2e-06"),
        ("inverse_sqrt", "then inverse_sqrt, at least 2e-06"),
        ("wsd", "then constant, and cosine to 2e-06 over the last 0.1 of the iterations"),
    ],
)
def test_a_schedule_in_words(schedule, said):
    text = in_words(lr=2e-5, min_lr=2e-6, warmup="10 iterations", schedule=schedule, cycles=3, power=2.0)
    assert text.endswith(said)
