"""How long a pipeline waits: stages that sleep, for two times, so that what they compute and send besides drops out of the difference."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from tests.distributed.worker import prepare

SHORT, LONG = 0.02, 0.10
ITERATIONS = 5  # one to warm up, then short and long in turns


class _Delay:
    seconds = SHORT


class _Sleep(Function):
    """Takes its time forward, and twice that backward."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, delay: _Delay) -> Tensor:
        context.seconds = delay.seconds
        time.sleep(delay.seconds)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(2 * context.seconds)
        return gradient, None


class _Slow(nn.Module):
    def __init__(self, block: nn.Module, delay: _Delay) -> None:
        super().__init__()
        self._block, self._delay = block, delay

    def forward(self, hidden: Tensor, row: Any) -> Tensor:
        function: Any = _Sleep
        result: Tensor = function.apply(self._block(hidden, row), self._delay)
        return result


def measure(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """In how many turns of a stage, forward and backward, an iteration is done."""
    run, delay = prepare(case | {"iterations": ITERATIONS}, device), _Delay()
    blocks = run.built.stage.blocks
    for number, block in enumerate(blocks):
        blocks[number] = _Slow(block, delay)
    taken: dict[float, list[float]] = {SHORT: [], LONG: []}
    for number, record in enumerate(run.train()):
        if number:
            taken[delay.seconds].append(record["seconds"])
        delay.seconds = LONG if number % 2 else SHORT
    turn = 3 * (LONG - SHORT) * len(blocks)
    return {"turns": (min(taken[LONG]) - min(taken[SHORT])) / turn, "micro_batches": record["micro_batches"]}
