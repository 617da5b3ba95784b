"""Counting the bytes of live tensors of this process, whatever device they are on: a peak that needs no GPU."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Live bytes of all storages that operations return while this is entered, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.at_peak: Counter[tuple[str, int]] = Counter()  # (operation, bytes): how many
        self._known: dict[int, tuple[Any, str, int]] = {}
        self._details = False

    def begin(self, details: bool = False) -> None:
        """Forget the peak so far."""
        self.peak, self._details = self.live, details

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._note(tensor.untyped_storage(), str(function))
        return result

    def _note(self, storage: Any, name: str) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = (weakref.ref(storage, lambda _: self._forget(key)), name, size)
        self.live += size
        if self.live > self.peak:
            self.peak = self.live
            if self._details:
                self.at_peak = Counter((name, size) for _, name, size in self._known.values())

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)[2]
