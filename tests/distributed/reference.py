"""The reference for every number format: a bare loop over transformers or PEFT, one document at a time, with nothing of ours in it.

Weights are in the run's dtype. Gradients are summed in float32, and an optimizer updates float32 copies of the weights, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.distributed import plain


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run did: by any means, so that two can be compared."""

    records: list[tuple[float, float]]  # loss and gradient norm of each iteration
    gradients: dict[str, Tensor]  # summed, of the first iteration, before clipping
    updates: dict[str, Tensor]  # float32 weights after the last iteration less those before the first
    weights: dict[str, Tensor]  # after the last iteration, as the model computes with them


def make_model(config: Any, dtype: torch.dtype, dense: Mapping[str, Tensor] | None = None, attention: str = "eager") -> Any:
    """`plain.make_model` in another dtype. `dense` are weights to be used instead of the random ones."""
    whole = dict(plain.make_model(config).named_parameters())
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_((dense or {}).get(name, whole[name]))
    return model.train()


def train(
    model: Any, reader: Any, batches: list[np.ndarray], loss_mask: float, make_optimizer: Callable[[list[Any]], Any],
    own_name: Callable[[str], str] = lambda name: name,
) -> Trained:  # fmt: skip
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    masters = {name: torch.nn.Parameter(parameter.detach().float().clone()) for name, parameter in trained.items()}
    begin = {name: master.detach().clone() for name, master in masters.items()}
    optimizer = make_optimizer(_groups(masters.values()))
    first: dict[str, Tensor] = {}
    records = []
    for numbers in batches:
        loss, sums = _gradients(model, trained, reader, numbers, loss_mask)
        first = first or {name: value.clone() for name, value in sums.items()}
        for name, master in masters.items():
            master.grad = sums[name]
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), plain.CLIP)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(masters[name])
        records.append((loss, float(norm)))
    return Trained(
        records=records, gradients={own_name(name): value for name, value in first.items()},
        updates={own_name(name): master.detach() - begin[name] for name, master in masters.items()},
        weights={own_name(name): parameter.detach() for name, parameter in trained.items()},
    )  # fmt: skip


def _gradients(
    model: Any, trained: Mapping[str, Any], reader: Any, numbers: np.ndarray, loss_mask: float
) -> tuple[float, dict[str, Tensor]]:
    weights = [plain.weights_of(reader[int(number)], loss_mask) for number in numbers]
    total = sum(float(weight.sum()) for weight in weights)
    sums = {name: torch.zeros(parameter.shape) for name, parameter in trained.items()}
    loss_sum = 0.0
    for number, weight in zip(numbers, weights, strict=True):
        ids = torch.from_numpy(reader[int(number)].ids.astype(np.int64))[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        loss = (torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none") * weight).sum() / total
        loss.backward()
        loss_sum += float(loss.detach())
        for name, parameter in trained.items():
            if parameter.grad is not None:
                sums[name] += parameter.grad.float()
                parameter.grad = None
    return loss_sum, sums


def _groups(masters: Any) -> list[dict[str, Any]]:
    masters = list(masters)
    groups = [
        {"params": [m for m in masters if m.dim() > 1], "weight_decay": plain.DECAY},
        {"params": [m for m in masters if m.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(groups: list[Any]) -> Any:
    return torch.optim.AdamW(groups, lr=plain.LR, betas=plain.BETAS, eps=plain.EPS)


def sgd(groups: list[Any]) -> Any:
    return torch.optim.SGD(groups, lr=plain.LR)


def adamw8bit(groups: list[Any]) -> Any:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, lr=plain.LR, betas=plain.BETAS, eps=plain.EPS)


OPTIMIZERS: dict[str, Callable[[list[Any]], Any]] = {"adamw": adamw, "sgd": sgd, "adamw8bit": adamw8bit}


def cosine(one: Tensor, other: Tensor) -> float:
    """1 where both are zero."""
    a, b = one.double().flatten(), other.double().flatten()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else float(bool(a.norm() == b.norm()))
