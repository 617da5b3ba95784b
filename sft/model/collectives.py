"""Communication between tensor-parallel ranks, forward and backward. The group is passed in; this package creates none.

Inside a region (attention, MLP) every rank sees all tokens and computes its share of the features. Outside, tokens are
either on all ranks, or, with sequence parallelism, each rank has its stretch of them. Token dimensions are -2, feature
dimensions -1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.autograd import Function


class TensorGroup(Protocol):
    """The ranks that share a model's tensors."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum(self, tensor: Tensor) -> Tensor: ...

    def maximum(self, tensor: Tensor) -> Tensor: ...

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """Concatenate all ranks' tensors along `dim`."""

    def sum_scatter(self, tensor: Tensor, dim: int) -> Tensor:
        """Sum over ranks, and return this rank's slice of `dim`."""


@dataclass(frozen=True)
class SingleRank:
    """A group of one process. Rank and size may differ, to build another rank's parts without its processes."""

    rank: int = 0
    size: int = 1

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor

    def sum_scatter(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor


def own_stretch(tensor: Tensor, group: TensorGroup, dim: int) -> Tensor:
    return tensor.chunk(group.size, dim)[group.rank].contiguous()


class _Enter(Function):
    """Enter a region with tokens that all ranks have; their gradients are partial sums."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, group: TensorGroup) -> Tensor:
        context.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return context.group.sum(gradient), None


class _Leave(Function):
    """Leave a region: sum the partial results on all ranks."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, group: TensorGroup) -> Tensor:
        return group.sum(tensor)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _EnterFromStretch(Function):
    """Enter a region from slices of the tokens: gather all tokens."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, group: TensorGroup) -> Tensor:
        context.group = group
        return group.gather(tensor, -2)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return context.group.sum_scatter(gradient, -2), None


class _LeaveToStretch(Function):
    """Leave a region: sum the partial results, and keep this rank's slice of the tokens."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, group: TensorGroup) -> Tensor:
        context.group = group
        return group.sum_scatter(tensor, -2)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return context.group.gather(gradient, -2), None


class _Gather(Function):
    """Gather slices of `dim`, on ranks that then all compute the same."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, group: TensorGroup, dim: int) -> Tensor:
        context.group, context.dim = group, dim
        return group.gather(tensor, dim)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return own_stretch(gradient, context.group, context.dim), None, None


class _Split(Function):
    """Split what all ranks have into slices of `dim`."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, group: TensorGroup, dim: int) -> Tensor:
        context.group, context.dim = group, dim
        return own_stretch(tensor, group, dim)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return context.group.gather(gradient, context.dim), None, None


def enter_region(hidden: Tensor, group: TensorGroup, sequence_parallel: bool) -> Tensor:
    return _applied((_EnterFromStretch if sequence_parallel else _Enter), hidden, group)


def leave_region(partial_sum: Tensor, group: TensorGroup, sequence_parallel: bool) -> Tensor:
    return _applied((_LeaveToStretch if sequence_parallel else _Leave), partial_sum, group)


def gather(stretch: Tensor, group: TensorGroup, dim: int) -> Tensor:
    return _applied(_Gather, stretch, group, dim)


def split(whole: Tensor, group: TensorGroup, dim: int) -> Tensor:
    return _applied(_Split, whole, group, dim)


class _SumOfParts(Function):
    """A sum that each rank uses for its own features, so gradients are summed as well."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, group: TensorGroup) -> Tensor:
        context.group = group
        return group.sum(tensor)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return context.group.sum(gradient), None


def sum_of_parts(tensor: Tensor, group: TensorGroup) -> Tensor:
    return _applied(_SumOfParts, tensor, group)


def _applied(function: Any, *arguments: Any) -> Tensor:
    output: Tensor = function.apply(*arguments)
    return output
