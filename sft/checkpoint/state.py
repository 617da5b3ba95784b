"""A pipeline's training state as it lies in this process: ZeRO-1's fragments of float32 weights and of the optimizer's states.

What we rely on in DeepSpeed's two ZeRO-1 optimizers (for float32 and for bfloat16; 0.19) is named here, one function for each name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sft.checkpoint import eight_bits

if TYPE_CHECKING:
    from sft.engine.pipeline import Pipeline

MASTER = "master"  # the float32 weights, beside the optimizer's own names: exp_avg, exp_avg_sq


@dataclass(frozen=True)
class Piece:
    """A stretch of this process's part of a parameter, or of an optimizer state of it. `live` is the memory that training uses."""

    name: str  # Hugging Face's
    state: str
    offset: int  # of the stretch in the part, flat
    live: Tensor


@contextlib.contextmanager
def opened(pipeline: Pipeline, *, writes: bool = False) -> Iterator[list[Piece]]:
    """All that this process updates: of every trainable parameter the stretch that ZeRO-1 gave to this replica.

    8-bit states are float32 copies here, put back at the end where `writes` says that they may have changed.
    """
    create_states(pipeline)
    optimizer = _torch_optimizer(pipeline)
    flats = _flats(optimizer)
    states = [_flat_states(optimizer, flat) for flat in flats]
    yield list(_pieces(pipeline, flats, states))
    if writes and eight_bits.is_of_8_bits(optimizer):
        for flat, numbers in zip(flats, states, strict=True):
            eight_bits.write(optimizer.state[flat], numbers)


def _pieces(pipeline: Pipeline, flats: list[Tensor], states: list[dict[str, Tensor]]) -> Iterator[Piece]:
    for name, parameter in pipeline.built.parameters.items():
        found = _address(parameter)
        if found is None:
            continue
        group, start, length, offset = found
        yield Piece(name, MASTER, offset, flats[group].detach().narrow(0, start, length))
        for state, values in states[group].items():
            yield Piece(name, state, offset, values.narrow(0, start, length))


def trainable(pipeline: Pipeline) -> list[str]:
    return [name for name, parameter in pipeline.built.parameters.items() if parameter.requires_grad]


def is_written_here(pipeline: Pipeline, name: str) -> bool:
    """Of the ranks that hold the same, one writes: the owner of a slice, tensor rank 0, and of tied embedding and head the first stage."""
    processes, part = pipeline.processes, pipeline.built.places[name].part
    if name == pipeline.built.tied_name and not processes.is_first_stage:
        return False
    return part.is_owner if part is not None else processes.tensor.rank == 0


def state_names(pipeline: Pipeline) -> list[str]:
    """Of a parameter, the float32 weights first. The same on every process."""
    create_states(pipeline)
    optimizer = _torch_optimizer(pipeline)
    return [MASTER, *sorted({name for flat in _flats(optimizer) for name in _flat_states(optimizer, flat)})]


def optimizer_step(pipeline: Pipeline) -> int:
    """How many updates the optimizer counts; 0 where it does not."""
    counts = [int(holder["step"]) for holder in _step_holders(_torch_optimizer(pipeline))]
    return max(counts, default=0)


def set_optimizer_step(pipeline: Pipeline, count: int) -> None:
    _set_steps(_torch_optimizer(pipeline), count)


def create_states(pipeline: Pipeline) -> None:
    """Before the first update an optimizer has no states: an update with rate 0 by no gradient makes them, in whatever way it does."""
    optimizer = _torch_optimizer(pipeline)
    if all(optimizer.state[flat] for flat in _flats(optimizer)):
        return
    kept = [(group["lr"], group.get("weight_decay", 0.0)) for group in optimizer.param_groups]
    masters = [flat.detach().clone() for flat in _flats(optimizer)]
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
    for flat in _flats(optimizer):
        flat.grad = torch.zeros_like(flat)
    optimizer.step()
    for group, (lr, decay) in zip(optimizer.param_groups, kept, strict=True):
        group["lr"], group["weight_decay"] = lr, decay
    for flat, master in zip(_flats(optimizer), masters, strict=True):
        flat.grad = None
        flat.data.copy_(master)
    _set_steps(optimizer, 0)


def refresh_parameters(pipeline: Pipeline) -> None:
    """A collective call: the weights that the model computes with, anew from all replicas' float32 ones."""
    pipeline.engine.optimizer.update_lp_params()


def _address(parameter: Any) -> tuple[int, int, int, int] | None:
    """(group, where the fragment begins in its flat tensor, its length, where it begins in the parameter). None where there is none here.

    The states that DeepSpeed links to it are not used: it links them after the first group's update, when the second has none (0.19.8).
    """
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    within = mapping.get_hp_fragment_address()
    return mapping.param_group_index, within.start, within.numel, mapping.lp_fragment_address.start


def _torch_optimizer(pipeline: Pipeline) -> torch.optim.Optimizer:
    """The one that updates: its parameters are flat, one a group, this replica's share."""
    optimizer: torch.optim.Optimizer = pipeline.engine.optimizer.optimizer
    return optimizer


def _flats(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [flat for group in optimizer.param_groups for flat in group["params"]]


def _flat_states(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    state = optimizer.state[flat]
    if eight_bits.is_of_8_bits(optimizer):
        return eight_bits.read(state)
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and value.shape == flat.shape}


def _step_holders(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """torch counts a parameter's updates in its state, Apex in its group."""
    places = [*(optimizer.state[flat] for flat in _flats(optimizer)), *optimizer.param_groups]
    return [place for place in places if "step" in place]


def _set_steps(optimizer: torch.optim.Optimizer, count: int) -> None:
    for holder in _step_holders(optimizer):
        if isinstance(holder["step"], Tensor):
            holder["step"].fill_(count)
        else:
            holder["step"] = count
