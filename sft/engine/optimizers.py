"""The optimizers, each over two groups of parameters: those that decay, and biases and norms, which do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sft.engine.adafactor import Adafactor
from tokenize_data.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    name: str
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def make_optimizer(parameters: Mapping[str, nn.Parameter], settings: OptimizerSettings, device: torch.device) -> torch.optim.Optimizer:
    groups = _groups(parameters, settings.weight_decay)
    betas = (settings.beta1, settings.beta2)
    if settings.name == "adamw8bit":
        return _adamw8bit(groups, settings, betas)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr)
    if settings.name == "adafactor":
        return Adafactor(groups, lr=settings.lr, eps=settings.eps)
    assert settings.name == "adamw", settings.name
    if device.type == "cuda" and (fused := nvidia_fused_adam()) is not None:
        optimizer: torch.optim.Optimizer = fused(groups, lr=settings.lr, betas=betas, eps=settings.eps, adam_w_mode=True)
        return optimizer
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)


def nvidia_fused_adam() -> Any:
    """NVIDIA Apex's FusedAdam where it is installed. A package of the same name on PyPI has nothing to do with it, and no such class."""
    try:
        from apex.optimizers import FusedAdam
    except ImportError:
        return None
    return FusedAdam


def _adamw8bit(groups: list[dict[str, Any]], settings: OptimizerSettings, betas: tuple[float, float]) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError("--optimizer adamw8bit needs bitsandbytes: pip install 'sft[quantized]', or use --optimizer adamw") from error
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=settings.lr, betas=betas, eps=settings.eps)
    return optimizer


def _groups(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """A vector is a bias or a norm. Every stage has the same groups: the engine reduces norms group by group."""
    decaying = [parameter for parameter in parameters.values() if parameter.requires_grad and parameter.dim() > 1]
    others = [parameter for parameter in parameters.values() if parameter.requires_grad and parameter.dim() <= 1]
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
