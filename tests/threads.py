"""A tensor-parallel group of threads: what ranks exchange, without processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

_SECONDS = 20


class ThreadGroup:
    """One thread's view of the group."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, shared: list[Any]) -> None:
        self.rank, self.size, self._barrier, self._shared = rank, size, barrier, shared

    def sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._exchange(tensor)).sum(0)

    def maximum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._exchange(tensor)).amax(0)

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        return torch.cat(self._exchange(tensor), dim)

    def sum_scatter(self, tensor: Tensor, dim: int) -> Tensor:
        return self.sum(tensor).chunk(self.size, dim)[self.rank].contiguous()

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        self._shared[self.rank] = tensor.detach().clone()
        self._barrier.wait(_SECONDS)
        everyone = list(self._shared)
        self._barrier.wait(_SECONDS)
        return everyone


def run_together(size: int, function: Callable[[ThreadGroup], Any]) -> list[Any]:
    """What `function` returns on each of `size` ranks."""
    barrier, shared = threading.Barrier(size), [None] * size

    def run(rank: int) -> Any:
        try:
            return function(ThreadGroup(rank, size, barrier, shared))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
