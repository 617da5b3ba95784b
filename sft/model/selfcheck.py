"""Before a run: the stage, on a tiny random model of the same class, gives the logits and gradients that transformers gives.

With several tensor-parallel ranks it is run by all of them together, so that a plan that does not fit the model is found here.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sft.model.build import build_stage, without_dropout
from sft.model.collectives import TensorGroup
from sft.model.gradients import sum_partial
from sft.model.loss import negative_log_likelihood
from tokenize_data.errors import UserError

TOLERANCE = 1e-5
_GRADIENT_SLACK = 30  # gradients are sums over tokens and layers: their rounding is that much larger
_LENGTHS = (11, 5, 16)
_HEAD_SIZE = 8


def self_check(
    config: Any, group: TensorGroup, sequence_parallel: bool, *, recompute: str = "none", device: torch.device | None = None,
    tolerance: float = TOLERANCE, trust_remote_code: bool = False,
) -> float:  # fmt: skip
    """The largest difference of a loss or gradient, relative to the largest of its tensor. Refuses a model that differs."""
    kind = (config.architectures or [config.model_type])[0]
    try:
        reference = _reference(config, kind, trust_remote_code)
        return _compare(reference, kind, group, sequence_parallel, recompute, device or torch.device("cpu"), tolerance, trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # whatever a model's own code raises when it is called in a way that is not its own
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{kind} cannot be taken apart into stages ({type(error).__name__}: {reason}): it cannot be trained here yet; "
            "use a base model of another family"
        ) from error


def _compare(
    reference: Any, kind: str, group: TensorGroup, sequence_parallel: bool, recompute: str, device: torch.device, tolerance: float,
    trust_remote_code: bool,
) -> float:  # fmt: skip
    reference = reference.to(device)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(1)
        documents = [torch.randint(3, reference.config.vocab_size, (1, length)).to(device) for length in _LENGTHS]
    layers = range(reference.config.num_hidden_layers)
    built = build_stage(
        reference.config, layers, group, sequence_parallel=sequence_parallel, recompute=recompute, dtype=torch.float32,
        device=device, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    whole = dict(reference.named_parameters())
    with torch.no_grad():
        for name, parameter in built.parameters.items():
            part = built.places[name].part
            parameter.copy_(part.take(whole[name]) if part else whole[name])
    _train(reference, documents)
    losses = _train_stage(built.stage, documents, reference.config.vocab_size, group)
    expected_losses = torch.cat([_losses(reference, ids) for ids in documents]).detach()
    worst, where = _difference(losses, expected_losses), "losses"
    gradients = {name: parameter.grad for name, parameter in built.parameters.items() if parameter.grad is not None}
    sum_partial(gradients, built.places, group)
    for name, parameter in whole.items():
        part, expected = built.places[name].part, parameter.grad
        found = gradients.get(name)
        if found is None or expected is None:
            raise UserError(f"{kind}: {name} gets no gradient: this model cannot be trained here yet")
        difference = _difference(found, part.take(expected) if part else expected)
        if difference > _GRADIENT_SLACK * worst:
            worst, where = difference / _GRADIENT_SLACK, f"gradient of {name}"
    worst = float(group.maximum(torch.tensor(worst, device=device)))  # so that no rank goes on alone
    if not worst <= tolerance:
        layout = f" at tp {group.size}" if group.size > 1 else ""
        raise UserError(
            f"{kind} taken apart into stages{layout} does not compute what transformers computes ({where}: off by {worst:.1e}): "
            "it cannot be trained here yet; use a base model of another family" + (" or --tp 1" if group.size > 1 else "")
        )
    return worst


def tiny(config: Any, least_layers: int = 2) -> Any:
    """The same class and structure (heads, kinds of layers, norms, biases, caps), small."""
    config = without_dropout(config)
    heads = config.num_attention_heads
    old_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = {
        "hidden_size": heads * _HEAD_SIZE, "head_dim": _HEAD_SIZE, "intermediate_size": heads * 16, "ffn_dim": heads * 16,
        "ffn_hidden_size": heads * 16, "vocab_size": 131, "max_position_embeddings": 64,
    }  # fmt: skip
    if getattr(config, "word_embed_proj_dim", None) not in (None, config.hidden_size):
        sizes["word_embed_proj_dim"] = heads * _HEAD_SIZE // 2
    elif hasattr(config, "word_embed_proj_dim"):
        sizes["word_embed_proj_dim"] = heads * _HEAD_SIZE
    kinds = list(getattr(config, "layer_types", None) or [])
    layers = min(config.num_hidden_layers, max([least_layers, *(kinds.index(kind) + 1 for kind in set(kinds))]))
    for name, value in sizes.items():
        if vars(config).get(name) is not None:  # some families compute head_dim
            setattr(config, name, value)
    if kinds:
        config.layer_types = kinds[:layers]
    config.num_hidden_layers = layers
    if getattr(config, "sliding_window", None):
        config.sliding_window = 8
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if (getattr(config, name, None) or 0) and name in vars(config):
            setattr(config, name, 0 if name == "pad_token_id" else 1)
    _shorten_factors(getattr(config, "rope_parameters", None), _HEAD_SIZE / old_size)
    return config


def _shorten_factors(rope: Any, ratio: float) -> None:
    """Some scalings of positions have one factor for each pair of a head's features."""
    for key, value in rope.items() if isinstance(rope, dict) else ():
        if isinstance(value, list):
            rope[key] = value[: max(1, int(len(value) * ratio))]
        elif isinstance(value, dict):
            _shorten_factors(value, ratio)
        elif key == "original_max_position_embeddings":
            rope[key] = 64


def _reference(config: Any, kind: str, trust_remote_code: bool) -> Any:
    try:
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(tiny(config)), attn_implementation="eager", dtype=torch.float32, trust_remote_code=trust_remote_code
        )  # fmt: skip
    except Exception as error:  # whatever a model's own constructor raises
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{kind} cannot be made small for the check before training ({type(error).__name__}: {reason}): it cannot be trained here yet"
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same on every rank
        for parameter in model.parameters():  # norms and biases begin as ones and zeros, and would hide a mistake
            torch.nn.init.normal_(parameter, mean=0.05, std=0.15)
    return model.train()


def _losses(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits, _targets(ids), reduction="none")


def _targets(ids: Tensor) -> Tensor:
    return ids[0].roll(-1)


def _train(model: Any, documents: list[Tensor]) -> None:
    sum((_losses(model, ids).sum() for ids in documents), torch.zeros(())).backward()


def _train_stage(stage: Any, documents: list[Tensor], vocabulary_size: int, group: TensorGroup) -> Tensor:
    device = documents[0].device
    positions = torch.cat([torch.arange(ids.size(1), device=device) for ids in documents])
    padding = torch.arange(-positions.numel() % group.size, device=device)
    ids = torch.cat([*documents, torch.zeros_like(padding)[None]], 1)
    hidden = stage((ids, torch.cat([positions, padding])[None]))
    logits = stage.logits(hidden, torch.arange(positions.numel(), device=device))
    losses = negative_log_likelihood(logits, torch.cat([_targets(one) for one in documents]), vocabulary_size, group)
    losses.sum().backward()
    return losses.detach()


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-3))
