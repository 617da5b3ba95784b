"""The interface of an optimizer: what it updates, with which settings."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sft.config.optimizer import OptimizerSpec
from sft.model.collectives import TensorGroup
from sft.model.tensor_parallel import ParameterShard
from sft.optimizer.shards import Shard

Groups = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an optimizer updates, and with what settings."""

    spec: OptimizerSpec
    shards: Sequence[Shard]
    group: TensorGroup
    device: torch.device
    outside: Collection[str] = ()  # names of parameters outside the layers

    @property
    def places(self) -> dict[Tensor, ParameterShard]:
        return {shard.weights: shard.place for shard in self.shards}


def make_algorithms(work: Work) -> list[torch.optim.Optimizer]:
    """Return the optimizers over this process's shards: a list, since some leave certain parameters to another one."""
    if not work.shards:
        return []
    made: list[torch.optim.Optimizer] = importlib.import_module(f"sft.optimizer.algorithms.{work.spec.name}").make(work)
    return made


def decaying_groups(work: Work) -> Groups:
    """Return parameter groups: weight decay for matrices, none for vectors (biases and norms)."""
    decaying = [shard.weights for shard in work.shards if shard.is_matrix]
    others = [shard.weights for shard in work.shards if not shard.is_matrix]
    decay = work.spec.weight_decay
    groups: Groups = [{"params": decaying, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
