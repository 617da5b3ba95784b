"""Completes gradients: sums partial gradients over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sft.model.collectives import TensorGroup
from sft.model.tensor_parallel import ParameterShard


def sum_partial(gradients: Mapping[str, Tensor], places: Mapping[str, ParameterShard], group: TensorGroup) -> None:
    """Sum a stage's partial gradients in place."""
    sum_shared(gradients, places, group)
    sum_replicas_of_parts(gradients, places, group)


def sum_shared(gradients: Mapping[str, Tensor], places: Mapping[str, ParameterShard], group: TensorGroup) -> None:
    """Sum, in place and in one collective, the gradients that all ranks hold."""
    names = [name for name in gradients if places[name].is_partial and not places[name].is_replica_of_part]
    if group.size == 1 or not names:
        return
    flat = group.sum(torch.cat([gradients[name].flatten() for name in names]))
    for name, part in zip(names, flat.split([gradients[name].numel() for name in names]), strict=True):
        gradients[name].copy_(part.view_as(gradients[name]))


def sum_replicas_of_parts(
    gradients: Mapping[str, Tensor], places: Mapping[str, ParameterShard], group: TensorGroup
) -> None:
    """Sum, in place and in one collective each, the gradients that only some ranks share."""
    if group.size == 1:
        return
    for name, gradient in gradients.items():
        place = places[name]
        if place.is_replica_of_part:
            assert place.part is not None
            everything = gradient.new_zeros(place.shape)
            place.part.put(everything, gradient)
            gradient.copy_(place.part.take(group.sum(everything)))
