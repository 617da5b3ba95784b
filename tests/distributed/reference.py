"""The reference for every number format: a bare loop over transformers or PEFT, one document at a time, with nothing of
ours in it.

Weights are in the run's dtype. Gradients are summed in float32, and an optimizer updates float32 copies of the weights,
tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tests.distributed import plain

MOMENTUM = 0.9


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run did: by any means, so that two can be compared."""

    records: list[tuple[float, float]]  # loss and gradient norm of each iteration
    gradients: dict[str, Tensor]  # summed, of the first iteration, before clipping
    updates: dict[str, Tensor]  # float32 weights after the last iteration less those before the first
    weights: dict[str, Tensor]  # after the last iteration, as the model computes with them


def make_model(
    config: Any, dtype: torch.dtype, dense: Mapping[str, Tensor] | None = None, attention: str = "eager"
) -> Any:
    """`plain.make_model` in another dtype. `dense` are weights to be used instead of the random ones."""
    whole = dict(plain.make_model(config).named_parameters())
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_((dense or {}).get(name, whole[name]))
    if dtype is not torch.float32 and not torch.cuda.is_available():
        _normalise_in_float32(model)
    return model.train()


def _normalise_in_float32(model: Any) -> None:
    """LayerNorms computed in float32: torch's CPU kernel sums the gradients of their weights in 16 bits."""

    def forward(norm: Any, inputs: Tensor) -> Tensor:
        weight, bias = (None if one is None else one.float() for one in (norm.weight, norm.bias))
        whole = functional.layer_norm(inputs.float(), norm.normalized_shape, weight, bias, norm.eps)
        return whole.to(inputs.dtype)

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = partial(forward, module)


def compute_in_halves(model: Any) -> None:
    """Each linear layer's matmul in four parts, half of its inputs by half of its outputs: the same mathematics, other
    roundings.
    """

    def forward(linear: Any, inputs: Tensor) -> Tensor:
        halves = inputs.chunk(2, -1)
        rows = [
            sum(functional.linear(half, part) for half, part in zip(halves, row.chunk(2, 1), strict=True))
            for row in linear.weight.chunk(2, 0)
        ]
        whole = torch.cat(rows, -1)
        return whole if linear.bias is None else whole + linear.bias

    for module in model.modules():
        if isinstance(module, nn.Linear) and min(module.weight.shape) > 1:
            module.forward = partial(forward, module)


def train(
    model: Any,
    reader: Any,
    batches: list[np.ndarray],
    loss_mask: float,
    make_optimizers: Callable[[dict[str, Any]], list[Any]],
    own_name: Callable[[str], str] = lambda name: name,
    *,
    kept_alone: bool = False,
) -> Trained:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    masters = {name: torch.nn.Parameter(parameter.detach().float().clone()) for name, parameter in trained.items()}
    begin = {name: master.detach().clone() for name, master in masters.items()}
    optimizers = make_optimizers({own_name(name): master for name, master in masters.items()})
    first: dict[str, Tensor] = {}
    records = []
    for numbers in batches:
        loss, sums = _gradients(model, trained, reader, numbers, loss_mask, kept_alone)
        first = first or {name: value.clone() for name, value in sums.items()}
        for name, master in masters.items():
            master.grad = sums[name]
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), plain.CLIP)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(masters[name])
        records.append((loss, float(norm)))
    return Trained(
        records=records,
        gradients={own_name(name): value.cpu() for name, value in first.items()},
        updates={own_name(name): (master.detach() - begin[name]).cpu() for name, master in masters.items()},
        weights={own_name(name): parameter.detach().cpu() for name, parameter in trained.items()},
    )


def _gradients(
    model: Any, trained: Mapping[str, Any], reader: Any, numbers: np.ndarray, loss_mask: float, kept_alone: bool
) -> tuple[float, dict[str, Tensor]]:
    weights = [plain.weights_of(reader[int(number)], loss_mask) for number in numbers]
    total = sum(float(weight.sum()) for weight in weights)
    sums = {name: torch.zeros(parameter.shape, device=parameter.device) for name, parameter in trained.items()}
    loss_sum = 0.0
    for number, own in zip(numbers, weights, strict=True):
        weight = own.to(model.device)
        ids = torch.from_numpy(reader[int(number)].ids.astype(np.int64))[None].to(model.device)
        targets = ids[0, 1:]
        if kept_alone:
            kept = weight.nonzero().flatten()
            hidden = model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[0, kept]
            logits, targets, weight = model.get_output_embeddings()(hidden).float(), targets[kept], weight[kept]
        else:
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        loss = (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weight).sum() / total
        loss.backward()
        loss_sum += float(loss.detach())
        for name, parameter in trained.items():
            if parameter.grad is not None:
                sums[name] += parameter.grad.float()
                parameter.grad = None
    return loss_sum, sums


def _groups(masters: Iterable[Any]) -> list[dict[str, Any]]:
    masters = list(masters)
    groups = [
        {"params": [m for m in masters if m.dim() > 1], "weight_decay": plain.DECAY},
        {"params": [m for m in masters if m.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _adamw(masters: dict[str, Any]) -> list[Any]:
    return [torch.optim.AdamW(_groups(masters.values()), lr=plain.LR, betas=plain.BETAS, eps=plain.EPS)]


def _sgd(masters: dict[str, Any], momentum: float = 0.0) -> list[Any]:
    return [torch.optim.SGD(_groups(masters.values()), lr=plain.LR, momentum=momentum)]


def _adamw8bit(masters: dict[str, Any]) -> list[Any]:
    from bitsandbytes.optim import AdamW8bit

    return [AdamW8bit(_groups(masters.values()), lr=plain.LR, betas=plain.BETAS, eps=plain.EPS)]


def _adafactor(masters: dict[str, Any]) -> list[Any]:
    from transformers.optimization import Adafactor

    return [
        Adafactor(_groups(masters.values()), lr=plain.LR, scale_parameter=False, relative_step=False, warmup_init=False)
    ]


def _muon(masters: dict[str, Any]) -> list[Any]:
    """torch's own for matrices inside the layers; embedding, head, biases and norms by AdamW."""
    inside = {name: m for name, m in masters.items() if m.dim() > 1 and ("layers." in name or ".h." in name)}
    rest = {name: m for name, m in masters.items() if name not in inside}
    made: list[Any] = []
    if inside:
        made.append(
            torch.optim.Muon(
                list(inside.values()), lr=plain.LR, weight_decay=plain.DECAY, adjust_lr_fn="match_rms_adamw"
            )
        )
    return made + (_adamw(rest) if rest else [])


OPTIMIZERS: dict[str, Callable[[dict[str, Any]], list[Any]]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "sgd, momentum": partial(_sgd, momentum=MOMENTUM),
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "muon": _muon,
}


def cosine(one: Tensor, other: Tensor) -> float:
    """1 where both are zero."""
    a, b = one.double().flatten(), other.double().flatten()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else float(bool(a.norm() == b.norm()))
