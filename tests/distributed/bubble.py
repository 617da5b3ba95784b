"""How long a pipeline waits, by the order in which its stages work: each one's turns are noted, and no time is
measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from tests.distributed.worker import prepare

FORWARD, BACKWARD = "F", "B"


class _Note(Function):
    """Notes when a stage computes forward, and when backward."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, turns: list[str]) -> Tensor:
        context.turns = turns
        turns.append(FORWARD)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        context.turns.append(BACKWARD)
        return gradient, None


class _Noted(nn.Module):
    def __init__(self, block: nn.Module, turns: list[str]) -> None:
        super().__init__()
        self._block, self._turns = block, turns

    def forward(self, hidden: Tensor, row: Any) -> Tensor:
        function: Any = _Note
        result: Tensor = function.apply(self._block(hidden, row), self._turns)
        return result


def measure(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The turns of this process's stage in an iteration, in their order."""
    run, turns = prepare(case | {"iterations": 1}, device), list[str]()
    blocks = run.built.stage.blocks
    blocks[0] = _Noted(blocks[0], turns)
    (record,) = run.train()
    return {"turns": "".join(turns), "stage": run.processes.stage, "micro_batches": record["micro_batches"]}


def time_of(stages: list[str]) -> int:
    """When the last turn ends, where a forward turn takes 1 and a backward one 2, and each begins as soon as what it
    needs is there.
    """
    ends: dict[tuple[int, str, int], int] = {}
    clocks, done = [0] * len(stages), [0] * len(stages)
    while any(done[stage] < len(turns) for stage, turns in enumerate(stages)):
        moved = False
        for stage, turns in enumerate(stages):
            while done[stage] < len(turns):
                kind = turns[done[stage]]
                number = turns[: done[stage]].count(kind)
                other = stage - 1 if kind == FORWARD else stage + 1
                needs_none = not 0 <= other < len(stages)
                if not needs_none and (other, kind, number) not in ends:
                    break
                begin = max(clocks[stage], 0 if needs_none else ends[other, kind, number])
                clocks[stage] = ends[stage, kind, number] = begin + (1 if kind == FORWARD else 2)
                done[stage] += 1
                moved = True
        assert moved, stages
    return max(clocks)
