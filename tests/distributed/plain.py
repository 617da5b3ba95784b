"""The oracle: a training loop over plain transformers in float32, one document at a time, with nothing of ours in
it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tokenize_data.chat import ASSISTANT, TEMPLATE

LR, BETAS, EPS, DECAY, CLIP = 3e-3, (0.9, 0.95), 1e-5, 0.1, 1.0


def make_model(config: Any, seed: int = 0) -> Any:
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
) -> list[tuple[float, float]]:
    """[(loss, gradient norm)], one an iteration. `on_document` is told the batch and the place in it of what comes
    next.
    """
    decaying = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decaying, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=LR, betas=BETAS, eps=EPS)
    results = []
    for numbers in batches:
        optimizer.zero_grad()
        weights = [weights_of(reader[int(n)], loss_mask) for n in numbers]
        total = sum(float(w.sum()) for w in weights)
        loss_sum = 0.0
        for place, (number, weight) in enumerate(zip(numbers, weights, strict=True)):
            on_document(numbers, place)
            ids = torch.from_numpy(reader[int(number)].ids.astype(np.int64))[None]
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            loss = (nll * weight).sum() / total
            loss.backward()
            loss_sum += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        results.append((loss_sum, float(norm)))
    return results


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
