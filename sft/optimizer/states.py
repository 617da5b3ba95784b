"""A sharded optimizer's states for saving and restoring: slices of tensors under Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sft.optimizer import eight_bits
from sft.optimizer.eight_bits import EightBits
from sft.optimizer.sharded import ShardedOptimizer
from sft.optimizer.shards import Shard

MASTER = "master"  # the float32 weights, beside the optimizers' own names: exp_avg, exp_avg_sq


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of this process's part of a parameter, or of a state of it. `live` is the memory that training uses."""

    name: str  # Hugging Face's
    state: str
    offset: int  # of the stretch in the part
    live: Tensor | EightBits  # flat
    shape: tuple[int, ...] | None = (
        None  # of a state that has not its parameter's shape: then it is all there, on every tensor rank
    )

    def numbers(self) -> Tensor:
        """The values as flat float32; training's own memory if that is float32."""
        return self.live if isinstance(self.live, Tensor) else self.live.numbers()


def pieces(optimizer: ShardedOptimizer) -> list[Piece]:
    """The pieces that this process updates."""
    create_states(optimizer)
    found = [
        Piece(name=shard.name, state=MASTER, offset=shard.offset, live=shard.weights.detach().reshape(-1))
        for shard in optimizer.shards
    ]
    return found + [
        _piece(shard, name, live) for shard, state in _states(optimizer) for name, live in _live(state).items()
    ]


def set_count_of_steps(optimizer: ShardedOptimizer, count: int) -> None:
    optimizer.num_steps = count
    for algorithm in optimizer.algorithms:
        _set_steps(algorithm, count)


def create_states(optimizer: ShardedOptimizer) -> None:
    """Before the first update an optimizer has no states: an update with rate 0 by no gradient makes them, in whatever
    way it does.
    """
    for algorithm in optimizer.algorithms:
        weights = [one for group in algorithm.param_groups for one in group["params"]]
        if all(algorithm.state[one] for one in weights):
            continue
        kept = [(group["lr"], group.get("weight_decay", 0.0)) for group in algorithm.param_groups]
        for group in algorithm.param_groups:
            group["lr"], group["weight_decay"] = 0.0, 0.0
        for one in weights:
            one.grad = torch.zeros_like(one)
        algorithm.step()
        for group, (lr, decay) in zip(algorithm.param_groups, kept, strict=True):
            group["lr"], group["weight_decay"] = lr, decay
        for one in weights:
            one.grad = None
        _set_steps(algorithm, 0)


def _states(optimizer: ShardedOptimizer) -> Iterator[tuple[Shard, dict[str, Any]]]:
    by_weights = {id(shard.weights): shard for shard in optimizer.shards}
    for algorithm in optimizer.algorithms:
        for group in algorithm.param_groups:
            for weights in group["params"]:
                yield by_weights[id(weights)], algorithm.state[weights]


def _live(state: dict[str, Any]) -> dict[str, Tensor | EightBits]:
    others = {name: value for name, value in state.items() if isinstance(value, Tensor) and name != "step"}
    return eight_bits.states_of(state) or dict(others)


def _piece(shard: Shard, name: str, live: Tensor | EightBits) -> Piece:
    if isinstance(live, EightBits):
        return Piece(name=shard.name, state=name, offset=shard.offset, live=live)
    if live.shape == shard.weights.shape:
        return Piece(name=shard.name, state=name, offset=shard.offset, live=live.view(-1))
    return Piece(name=shard.name, state=name, offset=0, live=live.view(-1), shape=tuple(live.shape))


def _set_steps(algorithm: torch.optim.Optimizer, count: int) -> None:
    """Set the step count, which torch keeps in a parameter's state, and Apex in its group."""
    for holder in (*algorithm.state.values(), *algorithm.param_groups):
        if isinstance(holder.get("step"), Tensor):
            holder["step"].fill_(count)
        elif "step" in holder:
            holder["step"] = count
