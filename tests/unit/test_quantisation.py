"""A new format of frozen weights is a line in a table and a file: planned, built and multiplied with."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from sft.config.adapters import AdapterSettings
from sft.config.quantisation import QUANTISATIONS, Quantisation, quantisation_of
from sft.families.table import architecture_of
from sft.model.build import build_stage
from sft.model.collectives import SingleRank
from sft.model.lora import LoraSettings
from sft.model.quantized import fill
from sft.plan.layout import Layout
from sft.plan.memory import Work, stage_memory
from sft.plan.stage_weights import Adapters
from tests.models import tiny_config
from tokenize_data.errors import UserError


@dataclass(frozen=True)
class _Signs:
    """The sign of each weight, and the mean size of all."""

    signs: torch.Tensor
    size: float
    dtype: torch.dtype

    def whole(self):
        return (self.signs.float() * self.size).to(self.dtype)

    def tensors(self):
        yield self.signs


class _Format:
    def check(self):
        pass

    def store(self, weight, dtype):
        return _Signs(weight.sign().to(torch.int8), float(weight.abs().mean()), dtype)


@pytest.fixture
def signs(monkeypatch):
    """What the new file and the new line would be."""
    module = ModuleType("sft.model.formats.signs")
    module.FORMAT = _Format()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(QUANTISATIONS, "signs", Quantisation(name="signs", bits=1, bytes_each=1.0))
    return QUANTISATIONS["signs"]


def test_it_can_be_asked_for(signs):
    assert AdapterSettings(lora=8, quantise="signs").quantisation == signs


def test_it_is_planned_with_its_bytes(signs):
    model = architecture_of(tiny_config("llama").to_dict())
    peaks = [
        stage_memory(model, Layout(), 0, range(4), _work(one)).weights for one in (signs, QUANTISATIONS["nf4"], None)
    ]
    linear = 4 * sum(one.inputs * one.outputs for one in model.linears)
    assert peaks[0] - peaks[1] == pytest.approx(linear * (1.0 - QUANTISATIONS["nf4"].bytes_each))
    assert peaks[2] > peaks[0]


def test_a_stage_computes_with_it(signs):
    built = build_stage(
        tiny_config("llama"),
        range(4),
        SingleRank(),
        sequence_parallel=False,
        recompute="none",
        dtype=torch.float32,
        device=torch.device("cpu"),
        lora=LoraSettings(rank=4, alpha=8.0),
        quantisation=signs,
    )
    weights = {name: torch.randn(weight.shape) for name, weight in built.quantized.items()}
    fill(built.quantized, built.places, lambda name, part: weights[name])
    hidden = torch.randn(3, weights["model.layers.0.mlp.up_proj.weight"].size(1))
    weight = weights["model.layers.0.mlp.up_proj.weight"]
    found = built.stage.blocks[0].layer.mlp.up_proj.frozen.product(hidden)
    torch.testing.assert_close(found, hidden @ (weight.sign() * weight.abs().mean()).t())


def test_settings_of_older_runs_name_a_format_too():
    for values, name in (
        ({"load_in_4bit": True}, "nf4"),
        ({"load_in_8bit": True}, "int8"),
        ({"quantise": "nf4"}, "nf4"),
    ):
        assert quantisation_of(values) == QUANTISATIONS[name]
    assert quantisation_of({"load_in_4bit": False}) is None


@pytest.mark.parametrize("settings", [{"load_in_4bit": True, "quantise": "int8"}, {"quantise": "int8"}])
def test_what_does_not_fit_together_is_refused(settings):
    with pytest.raises(UserError, match=r"exclude each other|freezes the base weights"):
        AdapterSettings(**settings, lora=8 if len(settings) > 1 else None).check()


def _work(quantisation):
    adapters = Adapters(rank=4, quantisation=quantisation)
    return Work(row_tokens=64, trained_share=0.5, micro_batches=1, recompute="none", adapters=adapters)
