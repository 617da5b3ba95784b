"""Stochastic gradient descent from torch, with optional momentum."""

from __future__ import annotations

import torch

from sft.optimizer.algorithms.interface import Work, decaying_groups


def make(work: Work) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(decaying_groups(work), lr=work.spec.lr, momentum=work.spec.momentum)]
