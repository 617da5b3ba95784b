"""8-bit optimizer states as numbers and back."""

from __future__ import annotations

import pytest
import torch

from sft.optimizer import eight_bits

bitsandbytes = pytest.importorskip("bitsandbytes")


def trained(size: int) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    torch.manual_seed(size)
    parameter = torch.nn.Parameter(torch.randn(size))
    optimizer = bitsandbytes.optim.AdamW8bit([parameter], lr=1e-3)
    for _ in range(4):
        parameter.grad = torch.randn(size) * torch.randn(size).exp()
        optimizer.step()
    return parameter, optimizer


@pytest.mark.parametrize("size", [9000, 8192, 100])  # the last is too small for 8 bits
def test_numbers_give_their_codes_back(size: int):
    parameter, optimizer = trained(size)
    state = optimizer.state[parameter]
    before = {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
    numbers = {name: values.clone() for name, values in _read(state).items()}
    assert numbers.keys() == {"exp_avg", "exp_avg_sq"}
    assert all(values.dtype == torch.float32 and values.shape == (size,) for values in numbers.values())
    _write(state, numbers)
    for name, value in before.items():
        if value.dtype == torch.uint8:
            assert torch.equal(state[name], value), name
    for name, values in _read(state).items():
        assert torch.equal(values, numbers[name]), name


def test_numbers_are_those_of_bitsandbytes():
    parameter, optimizer = trained(9000)
    state = optimizer.state[parameter]
    for ours, theirs in (("exp_avg", "1"), ("exp_avg_sq", "2")):
        expected = bitsandbytes.functional.dequantize_blockwise(
            state[f"state{theirs}"], absmax=state[f"absmax{theirs}"], code=state[f"qmap{theirs}"], blocksize=256
        )
        torch.testing.assert_close(_read(state)[ours], expected, rtol=0.0, atol=0.0)


def test_blocks_that_begin_elsewhere_keep_the_numbers_within_their_8_bits():
    """As after a resume with another layout: the half of one tensor, and another's beginning."""
    (one, first), (other, second) = trained(9000), trained(8192)
    numbers = _read(first.state[one])
    shifted = {name: torch.cat([values[100:], values[:100]])[:8192] for name, values in numbers.items()}
    _write(second.state[other], shifted)
    for name, values in _read(second.state[other]).items():
        largest = shifted[name].abs().view(-1, 256).amax(1).repeat_interleave(256)
        assert float(((values - shifted[name]).abs() / largest).max()) < 0.02, name


def test_nothing_at_all():
    parameter, optimizer = trained(8192)
    state = optimizer.state[parameter]
    _write(state, {name: torch.zeros(8192) for name in ("exp_avg", "exp_avg_sq")})
    assert all(not values.any() for values in _read(state).values())


def _read(state):
    found = eight_bits.states_of(state)
    return {name: values if isinstance(values, torch.Tensor) else values.numbers() for name, values in found.items()}


def _write(state, numbers):
    for name, values in eight_bits.states_of(state).items():
        if isinstance(values, eight_bits.EightBits):
            values.put(numbers[name])
