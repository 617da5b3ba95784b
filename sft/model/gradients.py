"""Making each rank's gradients whole: those of which several ranks hold parts are summed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sft.model.collectives import TensorGroup
from sft.model.tensor_parallel import Place


def sum_partial(gradients: Mapping[str, Tensor], places: Mapping[str, Place], group: TensorGroup) -> None:
    """In place. One exchange for all that every rank holds, one for each that only some ranks share."""
    if group.size == 1:
        return
    whole = [name for name in gradients if places[name].is_partial and not places[name].is_replica_of_part]
    if whole:
        flat = group.sum(torch.cat([gradients[name].flatten() for name in whole]))
        for name, part in zip(whole, flat.split([gradients[name].numel() for name in whole]), strict=True):
            gradients[name].copy_(part.view_as(gradients[name]))
    for name in gradients:
        place = places[name]
        if place.is_replica_of_part:
            assert place.part is not None
            everything = gradients[name].new_zeros(place.shape)
            place.part.put(everything, gradients[name])
            gradients[name].copy_(place.part.take(group.sum(everything)))
