"""AdamW: torch's fused version, or on a GPU NVIDIA Apex's if it is installed."""

from __future__ import annotations

from typing import Any

import torch

from sft.optimizer.algorithms.interface import Work, decaying_groups


def make(work: Work) -> list[torch.optim.Optimizer]:
    spec, groups = work.spec, decaying_groups(work)
    betas = (spec.beta1, spec.beta2)
    if work.device.type == "cuda" and (fused := nvidia_fused_adam()) is not None:
        return [fused(groups, lr=spec.lr, betas=betas, eps=spec.eps, adam_w_mode=True)]
    return [torch.optim.AdamW(groups, lr=spec.lr, betas=betas, eps=spec.eps, fused=True)]


def nvidia_fused_adam() -> Any:
    """Return NVIDIA Apex's FusedAdam, or None. The unrelated PyPI package `apex` has no such class."""
    try:
        from apex.optimizers import FusedAdam
    except ImportError:
        return None
    return FusedAdam
