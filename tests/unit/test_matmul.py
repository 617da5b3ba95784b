"""Matrix products by oneDNN: torch's own results, and a private name of torch's that has to stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sft.model import matmul


def both(hidden, layer):
    """Outputs and gradients, of torch's layer and of ours."""
    found = []
    for kind in (nn.Linear, matmul._Linear):
        layer.__class__ = kind
        given = hidden.clone().requires_grad_()
        layer.zero_grad()
        output = layer(given)
        output.square().sum().backward()
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        found.append([output.detach(), given.grad, *(parameter.grad.clone() for parameter in trained)])
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 300, 96), (300, 96), (1, 1, 96), (2, 7, 96)])
def test_products_are_torch_s(shape, bias):
    torch.manual_seed(0)
    for theirs, ours in zip(*both(torch.randn(shape), nn.Linear(96, 400, bias=bias)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_frozen_weight_has_no_gradient():
    layer = nn.Linear(96, 400)
    layer.weight.requires_grad_(False)
    theirs, ours = both(torch.randn(300, 96), layer)
    assert len(ours) == 3
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
def test_any_stride_can_be_multiplied(transposed):
    left, right = torch.randn(200, 130), torch.randn(130, 170)
    left = left.t().contiguous().t() if transposed[0] else left
    right = right.t().contiguous().t() if transposed[1] else right
    torch.testing.assert_close(matmul.multiply(left, right), left @ right, rtol=1e-4, atol=1e-4)


def test_this_torch_has_the_operation():
    """Without it training goes on as before, but slower: on some processors by half."""
    assert matmul.OPERATIONS


def test_only_float32_on_a_cpu_is_multiplied_so(monkeypatch):
    def never(*arguments):
        raise AssertionError

    monkeypatch.setattr(matmul, "OPERATIONS", (never,))
    large = torch.randn(128, 128)
    for tensor in (large.to(torch.bfloat16), large.double(), large.to("meta"), large[:2, :2]):
        matmul.multiply(tensor, tensor)
    with pytest.raises(AssertionError):
        matmul.multiply(large, large)
