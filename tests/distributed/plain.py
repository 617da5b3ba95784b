"""The oracle: training and validation with plain transformers, as `sft parity` has them, with the tests' numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from sft.config.optimizer import OptimizerSpec
from sft.verify import plain
from tokenize_data.rendered import ASSISTANT, TEMPLATE

LR, BETAS, EPS, DECAY, CLIP = 3e-3, (0.9, 0.95), 1e-5, 0.1, 1.0
_ADAMW = OptimizerSpec(name="adamw", lr=LR, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=DECAY)


def make_model(config: Any, seed: int = 0) -> Any:
    """Its weights are those that the checkpoints in tests/data were made on."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.02, std=0.1)
    return model.train()


def train(
    model: Any,
    reader: Any,
    batches: list[np.ndarray],
    loss_mask: float,
    on_document: Callable[[np.ndarray, int], None] = lambda *_: None,
    smoothing: float = 0.0,
) -> list[tuple[float, float]]:
    """[(loss, gradient norm)], one an iteration."""
    run = plain.train(model, reader, batches, loss_mask, _ADAMW, CLIP, smoothing=smoothing, on_document=on_document)
    return [(step.loss, step.grad_norm) for step in run.steps]


def validate(model: Any, reader: Any, num_documents: int, loss_mask: float) -> dict[str, float]:
    """The weighted mean loss over the first documents, and how many of the answers' tokens have the largest logit."""
    model.eval()
    nll_sum = weight_sum = 0.0
    right = answers = 0
    for number in range(num_documents):
        ids = torch.from_numpy(reader[number].ids.astype(np.int64))[None]
        weight = weights_of(reader[number], loss_mask)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        nll_sum += float((nll.double() * weight).sum())
        weight_sum += float(weight.sum())
        right += int(((logits.argmax(-1) == ids[0, 1:]) & (weight == 1)).sum())
        answers += int((weight == 1).sum())
    return {"val_loss": nll_sum / weight_sum, "val_accuracy": right / answers}


def weights_of(document: Any, loss_mask: float) -> torch.Tensor:
    roles = document.roles()[1:]
    return torch.from_numpy(
        np.where(roles == ASSISTANT, 1.0, np.where(roles == TEMPLATE, 0.0, loss_mask)).astype(np.float32)
    )
