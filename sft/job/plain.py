"""The measure of exactness: a training loop over plain transformers, one document at a time, with nothing of our model or engine in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sft.config.optimizer import OptimizerSpec
from tokenize_data.chat import ASSISTANT, TEMPLATE
from tokenize_data.reader import Document


@dataclass(frozen=True)
class PlainStep:
    loss: float
    grad_norm: float


def make_model(config: Any, seed: int = 0) -> Any:
    """A random model in float32, far enough from its initial state that a norm left out shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.02, std=0.1)
    return model.train()


def train(
    model: Any, reader: Any, batches: Sequence[np.ndarray], loss_mask: float, settings: OptimizerSpec, clip: float
) -> list[PlainStep]:
    """Iterations as they are meant: the gradient of the weighted mean over all trained tokens of the batch, clipped by its whole norm."""
    decaying = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": decaying, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps
    )  # fmt: skip
    steps = []
    for numbers in batches:
        optimizer.zero_grad()
        documents = [reader[int(number)] for number in numbers]
        total = sum(float(_weights(document, loss_mask).sum()) for document in documents)
        loss = 0.0
        for document in documents:
            part = document_loss(model, document, loss_mask) / total
            part.backward()
            loss += float(part.detach())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        steps.append(PlainStep(loss, float(norm)))
    return steps


def document_loss(model: Any, document: Document, loss_mask: float) -> Tensor:
    """The weighted sum of a document's negative log-likelihoods."""
    ids = torch.from_numpy(document.ids.astype(np.int64))[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return (torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none") * _weights(document, loss_mask)).sum()


def _weights(document: Document, loss_mask: float) -> Tensor:
    roles = document.roles()[1:]
    return torch.from_numpy(np.where(roles == ASSISTANT, 1.0, np.where(roles == TEMPLATE, 0.0, loss_mask)).astype(np.float32))
