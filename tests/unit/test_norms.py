"""LayerNorm in bfloat16 on a CPU, against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sft.model import norms


@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients_are_sums_in_float32(has_bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64, bias=has_bias)).bfloat16()
    hidden, gradient = torch.randn(4096, 64).bfloat16(), (torch.randn(4096, 64) * 0.01 + 0.003).bfloat16()
    truth = copy.deepcopy(model).double()
    truth(hidden.double()).backward(gradient.double())
    parameters = dict(model.named_parameters())
    norms.use_in(model)
    assert dict(model.named_parameters()) == parameters
    output = model(hidden)
    output.backward(gradient)
    assert output.dtype is torch.bfloat16
    for name, exact in truth.named_parameters():
        ours = parameters[name].grad.double()
        assert (ours - exact.grad).norm() <= 2**-8 * exact.grad.norm(), name


def test_in_float32_it_is_torch_s_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64))
    hidden = torch.randn(100, 64)
    expected = model(hidden)
    norms.use_in(model)
    assert torch.equal(model(hidden), expected)
