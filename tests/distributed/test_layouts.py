"""The core proof: however a run is laid out over processes, it computes what a plain loop over plain transformers
computes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from sft.plan.sampler import Sampler
from tests.distributed import plain, worker
from tests.distributed.data import MemoryReader
from tests.distributed.launch import Died, results_of, run_chosen
from tests.models import FAMILIES

TOLERANCE = 1e-5
# Key-value heads that --tp 4 cannot give to two ranks each: query, key and value are one layer, or normed together.
NO_TP4 = ("falcon-new", "olmo2", "phi3")
FAMILY: dict[str, Any] = {"layers": 2, "iterations": 4}

ONE: dict[str, Any] = {"recompute": "selective"}
REPLICAS: dict[str, Any] = {"pp": 2, "dp": 2, "pack": False, "val_documents": 5}
STRETCHES: dict[str, Any] = {"tp": 2, "pp": 2, "sequence_parallel": True, "loss_mask": 0.5, "recompute": "full"}
WHOLE: dict[str, Any] = {"tp": 4}
WHOLE_REPLICAS: dict[str, Any] = {"tp": 2, "dp": 2}
TABLE: dict[str, dict[str, Any]] = {
    "one": ONE,
    "one, unpacked": {"pack": False},
    "one, loss in chunks": {"micro_batch": 4, "loss_mask": 0.5, "at_once": 7},
    "tp2 x pp2, loss in chunks": {"tp": 2, "pp": 2, "micro_batch": 4, "at_once": 5, "sequence_parallel": True},
    "one, full recompute": {"recompute": "full", "micro_batch": 1, "loss_mask": 0.5},
    "dp4": {"dp": 4, "micro_batch": 1, "val_documents": 3},
    "dp2, 10 documents": {"dp": 2, "tp": 2, "global_batch": 10, "micro_batch": 3},
    "pp4": {"pp": 4, "recompute": "selective"},
    "pp2 x dp2, unpacked": REPLICAS,
    "pp2 x dp2": {"pp": 2, "dp": 2, "loss_mask": 0.5, "recompute": "selective", "micro_batch": 4, "val_documents": 1},
    "pp2 x tp2, uneven stages": {"tp": 2, "pp": 2, "costs": [1.0, 1.0, 1.0, 3.0], "recompute": "selective"},
    "tp4": WHOLE,
    "tp4, stretches": {"tp": 4, "sequence_parallel": True, "recompute": "full", "iterations": 4},
    "tp2 x pp2, stretches": STRETCHES,
    "tp2 x dp2": WHOLE_REPLICAS,
    "tp2 x dp2, stretches, unpacked": {
        "tp": 2,
        "dp": 2,
        "sequence_parallel": True,
        "pack": False,
        "recompute": "selective",
        "iterations": 4,
    },
}


def _cases() -> dict[str, dict[str, Any]]:
    cases = {f"llama: {name}": {"family": "llama", **layout} for name, layout in TABLE.items()}
    cases["llama3-tied: pp4"] = {"family": "llama3-tied", "pp": 4}
    cases["llama3-tied: pp2 x tp2, loss in chunks"] = {
        "family": "llama3-tied",
        "pp": 2,
        "tp": 2,
        "at_once": 5,
        **FAMILY,
    }
    cases["gemma2: pp2, loss in chunks"] = {
        "family": "gemma2",
        "pp": 2,
        "dp": 2,
        "at_once": 5,
        "micro_batch": 4,
        **FAMILY,
    }
    for name, layout in {"one": ONE, "tp4": WHOLE, "tp2 x pp2, stretches": STRETCHES}.items():
        cases[f"llama3-tied: {name}, smoothed labels"] = {
            "family": "llama3-tied",
            "label_smoothing": 0.2,
            "at_once": 7,
            **FAMILY,
            **layout,
        }
    cases["llama3-tied: tp4, stretches"] = {"family": "llama3-tied", "tp": 4, "sequence_parallel": True, **FAMILY}
    for family in FAMILIES:
        tensors = {"tp2 x dp2": WHOLE_REPLICAS} if family in NO_TP4 else {"tp4": WHOLE}
        for name, layout in {
            "one": ONE,
            "pp2 x dp2, unpacked": REPLICAS,
            "tp2 x pp2, stretches": STRETCHES,
            **tensors,
        }.items():
            cases.setdefault(f"{family}: {name}", {"family": family, **FAMILY, **layout})
    return cases


CASES = _cases()


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any] | Died]:
    return run_chosen(request, CASES, tmp_path_factory.mktemp("layouts"))


@cache
def oracle(
    family: str, layers: int, loss_mask: float, global_batch: int, iterations: int, smoothing: float
) -> tuple[list[Any], dict[str, torch.Tensor], Any]:
    """([(loss, gradient norm)], weights, the model to validate)."""
    torch.set_num_threads(1)
    config = worker.config_of({"family": family, "layers": layers})
    model = plain.make_model(config)
    sampler = Sampler(worker.DOCUMENTS, global_batch, worker.SEED)
    batches = [sampler.documents(iteration).astype(np.int64) for iteration in range(iterations)]
    records = plain.train(model, _reader(config), batches, loss_mask, smoothing=smoothing)
    return records, {name: parameter.detach() for name, parameter in model.named_parameters()}, model


@pytest.mark.timeout(3600)  # the first of them waits for all
@pytest.mark.parametrize("name", CASES)
def test_a_layout_trains_as_plain_transformers_does(name, results):
    case, ranks = CASES[name], results_of(results[name])
    mask, iterations = case.get("loss_mask", 0.0), case.get("iterations", worker.ITERATIONS)
    global_batch, layers = case.get("global_batch", worker.GLOBAL_BATCH), worker.config_of(case).num_hidden_layers
    records, weights, model = oracle(
        case["family"], layers, mask, global_batch, iterations, case.get("label_smoothing", 0.0)
    )
    validation = plain.validate(
        model, _reader(model.config), case.get("val_documents", worker.VALIDATION_DOCUMENTS), mask
    )
    for rank in ranks:
        assert "refusal" not in rank, rank["refusal"]
        torch.testing.assert_close(torch.tensor(rank["records"]), torch.tensor(records), rtol=TOLERANCE, atol=0.0)
        assert rank["validation"]["val_loss"] == pytest.approx(validation["val_loss"], rel=TOLERANCE)
        assert rank["validation"]["val_accuracy"] == validation["val_accuracy"]
    _compare_weights(ranks, weights)


def _compare_weights(ranks: list[Any], expected: dict[str, torch.Tensor]) -> None:
    """Every rank's own part, and the whole that they make together."""
    wholes = {name: torch.full_like(weight, torch.nan) for name, weight in expected.items()}
    for rank in ranks:
        for name, (part, found) in rank["weights"].items():
            if part is None:
                wholes[name].copy_(found)
            else:
                part.put(wholes[name], found)
            _assert_close(found, part.take(expected[name]) if part else expected[name], name)
    for name, whole in wholes.items():
        _assert_close(whole, expected[name], name)


def _assert_close(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-3))
    assert difference <= TOLERANCE, f"{name} is off by {difference:.1e}"


def _reader(config: Any) -> MemoryReader:
    return MemoryReader(worker.DOCUMENTS, config.vocab_size, worker.SEQ)
