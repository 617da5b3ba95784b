"""The optimizers by name, over the shards of this process: torch's and bitsandbytes' own where there are any.

Each is a list, since Muon is for matrices inside the layers and leaves the rest to AdamW. Biases and norms do not
decay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from sft.config.optimizer import OptimizerSpec
from sft.model.collectives import TensorGroup
from sft.model.tensor_parallel import ParameterShard
from sft.optimizer.adafactor import Adafactor
from sft.optimizer.muon import Muon
from sft.optimizer.shards import Shard
from tokenize_data.errors import UserError

Groups = list[dict[str, Any]]


def make_algorithms(
    spec: OptimizerSpec,
    shards: Sequence[Shard],
    group: TensorGroup,
    device: torch.device,
    outside: Collection[str] = (),
) -> list[torch.optim.Optimizer]:
    """`outside` names what is not inside the layers: Muon leaves it to AdamW."""
    if not shards:
        return []
    return _MAKERS[spec.name](spec, shards, group, device, outside)


def _adamw(
    spec: OptimizerSpec, shards: Sequence[Shard], group: TensorGroup, device: torch.device, outside: Any
) -> list[torch.optim.Optimizer]:
    groups, betas = _groups(spec, shards), (spec.beta1, spec.beta2)
    if device.type == "cuda" and (fused := nvidia_fused_adam()) is not None:
        return [fused(groups, lr=spec.lr, betas=betas, eps=spec.eps, adam_w_mode=True)]
    return [torch.optim.AdamW(groups, lr=spec.lr, betas=betas, eps=spec.eps, fused=True)]


def nvidia_fused_adam() -> Any:
    """NVIDIA Apex's FusedAdam where it is installed. A package of the same name on PyPI has nothing to do with it, and
    no such class.
    """
    try:
        from apex.optimizers import FusedAdam
    except ImportError:
        return None
    return FusedAdam


def _adamw8bit(
    spec: OptimizerSpec, shards: Sequence[Shard], group: TensorGroup, device: Any, outside: Any
) -> list[torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "--optimizer adamw8bit needs bitsandbytes: pip install 'megasft[quantized]', or use --optimizer adamw"
        ) from error
    return [AdamW8bit(_groups(spec, shards), lr=spec.lr, betas=(spec.beta1, spec.beta2), eps=spec.eps)]


def _sgd(
    spec: OptimizerSpec, shards: Sequence[Shard], group: TensorGroup, device: Any, outside: Any
) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(_groups(spec, shards), lr=spec.lr, momentum=spec.momentum)]


def _adafactor(
    spec: OptimizerSpec, shards: Sequence[Shard], group: TensorGroup, device: Any, outside: Any
) -> list[torch.optim.Optimizer]:
    places: dict[Tensor, ParameterShard] = {shard.weights: shard.place for shard in shards}
    return [Adafactor(_groups(spec, shards), lr=spec.lr, places=places, group=group)]


def _muon(
    spec: OptimizerSpec, shards: Sequence[Shard], group: TensorGroup, device: torch.device, outside: Collection[str]
) -> list[torch.optim.Optimizer]:
    matrices = [shard for shard in shards if shard.is_matrix and shard.name not in outside]
    rest = [shard for shard in shards if not shard.is_matrix or shard.name in outside]
    places: dict[Tensor, ParameterShard] = {shard.weights: shard.place for shard in matrices}
    made: list[torch.optim.Optimizer] = []
    if matrices:
        made.append(Muon(_groups(spec, matrices), lr=spec.lr, places=places, group=group))
    return made + (_adamw(spec, rest, group, device, outside) if rest else [])


_MAKERS: dict[str, Callable[..., list[torch.optim.Optimizer]]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "muon": _muon,
}


def _groups(spec: OptimizerSpec, shards: Sequence[Shard]) -> Groups:
    """A vector is a bias or a norm."""
    decaying = [shard.weights for shard in shards if shard.is_matrix]
    others = [shard.weights for shard in shards if not shard.is_matrix]
    groups: Groups = [{"params": decaying, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
