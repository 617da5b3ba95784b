"""Before a run: the parts put together, on a tiny random model of the same class, give the logits that transformers gives."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from sft.model import attention
from sft.model.anatomy import find_anatomy
from sft.model.parts import lengths_of, take_apart
from tokenize_data.errors import UserError

TOLERANCE = 1e-5
_LENGTHS = (11, 5, 17)


def self_check(config: Any, tolerance: float = TOLERANCE) -> float:
    """The largest difference of a logit, over a packed row of three documents, relative to the largest logit. Refuses what differs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        for parameter in model.parameters():  # norms and biases begin as ones and zeros, and would hide a mistake
            torch.nn.init.normal_(parameter, mean=0.05, std=0.15)
        documents = [torch.randint(3, config.vocab_size, (1, length)) for length in _LENGTHS]
    with torch.no_grad():
        expected = torch.cat([model(input_ids=ids, use_cache=False).logits for ids in documents], 1)
        anatomy = find_anatomy(model)
        model.set_attn_implementation(attention.NAME)
        embedding, blocks, head = take_apart(model, anatomy)
        positions = torch.cat([torch.arange(length) for length in _LENGTHS])[None]
        hidden = embedding(torch.cat(documents, 1), positions)
        for block in blocks:
            hidden = block(hidden, positions, lengths_of(positions))
        found = head(hidden)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= tolerance:
        raise UserError(
            f"{type(model).__name__} taken apart into stages does not give transformers' logits (they differ by {difference:.1e}): "
            "it cannot be trained here yet; use a base model of another family"
        )
    return difference
