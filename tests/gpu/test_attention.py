"""The kernel for all documents of a row, against exact attention in float64: outputs and gradients."""

from __future__ import annotations

import pytest
import torch

from sft.model import attention

# Inputs are rounded to bfloat16, and so are the probabilities and the result: each to within 2^-9 of itself. The errors
# of the terms of a sum average out; those of input, probability and output add up like a random walk.
BOUND = 3**0.5 * 2**-9 * 2
LENGTHS = {"a few": [5, 1, 9], "many": [1, 2, 3, 130, 64, 1, 257, 511, 31, 24], "one": [1024]}


def _exact(query, key, value, window, scale):
    """One document, in float64."""
    groups = query.size(1) // key.size(1)
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    ago = torch.arange(query.size(2), device="cuda")
    ago = ago[:, None] - ago
    seen = (ago >= 0) & (ago < (window or query.size(2)))
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ value


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize(("head_size", "groups"), [(64, 4), (64, 2), (80, 4), (96, 1), (128, 2), (256, 1)])
def test_outputs_and_gradients_are_those_of_exact_attention(lengths, window, head_size, groups):
    torch.manual_seed(0)
    lengths, scale = LENGTHS[lengths], head_size**-0.5
    total = sum(lengths)
    query, key, value, seed = (
        torch.randn(1, heads, total, head_size, device="cuda", dtype=torch.bfloat16) for heads in (4, groups, groups, 4)
    )
    tensors = [query, key, value]
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    for tensor in tensors:
        tensor.requires_grad_()
    documents = attention.documents_of(lengths, query)
    assert documents.bounds is not None
    found, _ = attention.packed_attention(
        torch.nn.Identity(), *tensors, None, documents=documents, sliding_window=window, scaling=scale
    )
    pieces = zip(*(tensor.split(lengths, 2) for tensor in exact), strict=True)
    expected = torch.cat([_exact(*piece, window, scale) for piece in pieces], 2).transpose(1, 2)
    ours = torch.autograd.grad(found, tensors, seed.transpose(1, 2))
    theirs = torch.autograd.grad(expected, exact, seed.transpose(1, 2).double())
    for name, one, other in zip(("output", "query", "key", "value"), (found, *ours), (expected, *theirs), strict=True):
        distance = float((one.double() - other).norm() / other.norm())
        assert distance < BOUND, f"{name} is off by {distance:.1e}"
