"""The reference: a training loop over plain transformers, one document at a time, without our model or engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sft.config.optimizer import OptimizerSpec
from tokenize_data.reader import Document
from tokenize_data.rendered import ASSISTANT, TEMPLATE


@dataclass(frozen=True)
class PlainStep:
    loss: float
    grad_norm: float


@dataclass(frozen=True, kw_only=True)
class PlainRun:
    steps: list[PlainStep]
    masters: dict[str, Tensor]  # float32 weights after the last iteration
    updates: dict[str, Tensor]  # progress of training


def make_model(config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random model, perturbed so that a missing norm would show. In every dtype it has the same weights, rounded."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.empty(parameter.shape).normal_(mean=0.02, std=0.1).to(dtype)
    return model.train()


def train(
    model: Any,
    reader: Any,
    batches: Sequence[np.ndarray],
    loss_mask: float,
    settings: OptimizerSpec,
    clip: float,
    smoothing: float = 0.0,
    on_document: Callable[[np.ndarray, int], None] = lambda *_: None,
) -> PlainRun:
    """Iterations as they are meant: the gradient of the weighted mean over all trained tokens of the batch, clipped by
    its whole norm.

    Gradients are summed in float32, and AdamW updates float32 weights, of which the model has a rounded copy.
    `on_document` is called with the batch and the place in it of the document that comes next.
    """
    weights = trained_parameters(model)
    masters = {name: nn.Parameter(parameter.detach().float().clone()) for name, parameter in weights.items()}
    begin = {name: master.detach().clone() for name, master in masters.items()}
    groups = [
        {"params": [master for master in masters.values() if master.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [master for master in masters.values() if master.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
    )
    steps = []
    for numbers in batches:
        loss, sums = gradients(model, reader, numbers, loss_mask, smoothing, on_document)
        for name, master in masters.items():
            master.grad = sums[name]
        norm = nn.utils.clip_grad_norm_(masters.values(), clip)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.copy_(masters[name])
        steps.append(PlainStep(loss, float(norm)))
    ends = {name: master.detach() for name, master in masters.items()}
    return PlainRun(steps=steps, masters=ends, updates={name: end - begin[name] for name, end in ends.items()})


def trained_parameters(model: Any) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(
    model: Any,
    reader: Any,
    numbers: np.ndarray,
    loss_mask: float,
    smoothing: float = 0.0,
    on_document: Callable[[np.ndarray, int], None] = lambda *_: None,
) -> tuple[float, dict[str, Tensor]]:
    """The loss over documents, and all trained parameters' gradients, summed in float32."""
    documents = [reader[int(number)] for number in numbers]
    total = sum(float(_weights(document, loss_mask).sum()) for document in documents)
    weights = trained_parameters(model)
    sums = {name: torch.zeros(parameter.shape, device=parameter.device) for name, parameter in weights.items()}
    loss = 0.0
    for place, document in enumerate(documents):
        on_document(numbers, place)
        part = document_loss(model, document, loss_mask, smoothing) / total
        part.backward()
        loss += float(part.detach())
        for name, parameter in weights.items():
            if parameter.grad is not None:
                sums[name] += parameter.grad
                parameter.grad = None
    return loss, sums


@torch.no_grad()
def token_losses(model: Any, reader: Any, numbers: Iterable[int], loss_mask: float) -> Tensor:
    """The negative log-likelihoods of all counted tokens, concatenated over documents."""
    found = []
    for number in numbers:
        document = reader[int(number)]
        counts = _weights(document, loss_mask) > 0
        found.append(_nll(model, document).cpu()[counts])
    return torch.cat(found)


def document_loss(model: Any, document: Document, loss_mask: float, smoothing: float = 0.0) -> Tensor:
    """The weighted sum of a document's negative log-likelihoods."""
    nll = _nll(model, document, smoothing)
    return (nll * _weights(document, loss_mask).to(nll.device)).sum()


def _nll(model: Any, document: Document, smoothing: float = 0.0) -> Tensor:
    ids = torch.from_numpy(document.ids.astype(np.int64))[None].to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none", label_smoothing=smoothing)


def _weights(document: Document, loss_mask: float) -> Tensor:
    roles = document.roles()[1:]
    return torch.from_numpy(
        np.where(roles == ASSISTANT, 1.0, np.where(roles == TEMPLATE, 0.0, loss_mask)).astype(np.float32)
    )
