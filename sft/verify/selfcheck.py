"""The self-check before a run: on a tiny random model of the same class, our stage must give transformers' logits and
gradients. Tensor-parallel ranks run it together, so that an unsuitable plan is found here.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from sft.families.table import family_of
from sft.model.build import build_stage, without_dropout
from sft.model.collectives import TensorGroup
from sft.model.gradients import sum_partial
from sft.model.tensor_parallel import ParameterShard
from sft.objective.likelihood import negative_log_likelihood
from tokenize_data.errors import UserError

TOLERANCE = 1e-5
_GRADIENT_SLACK = 30  # gradients are sums over tokens and layers, with larger rounding errors
_LENGTHS = (11, 5, 16)
_HEAD_SIZE = 8
_ROUNDING_SHARE, _ROUNDING_TIMES = 0.1, 6.0


def self_check(
    config: Any,
    group: TensorGroup,
    sequence_parallel: bool,
    *,
    recompute: str = "none",
    device: torch.device | None = None,
    tolerance: float = TOLERANCE,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
) -> float:
    """The largest difference of a loss or gradient, relative to the largest of its tensor. Refuses a model that
    differs.

    Compared in float32 first, with exact attention, and then in the run's own `dtype`, with the attention kernel that
    the run uses.
    """
    kind = (config.architectures or [config.model_type])[0]
    device = device or torch.device("cpu")
    try:
        reference = _reference(config, kind, trust_remote_code)
        run = partial(
            _Run,
            kind=kind,
            group=group,
            sequence_parallel=sequence_parallel,
            recompute=recompute,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else contextlib.nullcontext():
            worst = _compare(run(dtype=torch.float32), reference, tolerance)
        if dtype is not torch.float32:
            _compare(run(dtype=dtype), reference, 1.0)
        return worst
    except UserError:
        raise
    except Exception as error:  # whatever a model's own code raises when it is called differently
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{kind} cannot be split into stages ({type(error).__name__}: {reason}): it cannot be trained here "
            "yet; "
            "use a base model of another family"
        ) from error


@dataclass(frozen=True, kw_only=True)
class _Run:
    """How the compared stage runs."""

    kind: str
    group: TensorGroup
    sequence_parallel: bool
    recompute: str
    device: torch.device
    trust_remote_code: bool
    dtype: torch.dtype


def _compare(run: _Run, model: Any, tolerance: float) -> float:
    """The relative difference in float32; in other formats, relative to the allowed rounding."""
    reference = copy.deepcopy(model).to(run.device)
    documents = _documents(reference.config.vocab_size, run.device)
    expected = _trained_with(reference, documents, run.dtype)
    exact = (
        expected
        if run.dtype is torch.float32
        else _trained_with(reference, documents, torch.float32, weights=run.dtype)
    )
    losses, gradients, places = _stage_trained_with(run, reference, documents)
    measure = _difference if run.dtype is torch.float32 else _share_of_rounding
    worst, where = measure(losses, expected.losses, exact.losses), "losses"
    slack = _GRADIENT_SLACK if run.dtype is torch.float32 else 1.0
    for name in dict(reference.named_parameters()):
        part, found, whole = places[name].part, gradients.get(name), expected.gradients.get(name)
        if found is None or whole is None:
            raise UserError(f"{run.kind}: {name} gets no gradient: this model cannot be trained here yet")
        theirs, truth = (part.take(one) if part else one for one in (whole, exact.gradients[name]))
        difference = measure(found, theirs, truth)
        if difference > slack * worst:
            worst, where = difference / slack, f"gradient of {name}"
    worst = float(run.group.maximum(torch.tensor(worst, device=run.device)))  # so that no rank continues alone
    if not worst <= tolerance:
        layout = f" at tp {run.group.size}" if run.group.size > 1 else ""
        in_format = "" if run.dtype is torch.float32 else f" in {str(run.dtype).removeprefix('torch.')}"
        by = f"off by {worst:.1e}" if run.dtype is torch.float32 else f"off by {worst:.1f} times what rounding explains"
        raise UserError(
            f"{run.kind} split into stages{layout} does not compute what transformers computes{in_format} "
            f"({where}: {by}): "
            "it cannot be trained here yet; use a base model of another family"
            + (" or --tp 1" if run.group.size > 1 else "")
        )
    return worst


@dataclass(frozen=True)
class _Trained:
    losses: Tensor
    gradients: dict[str, Tensor]


def _documents(vocabulary_size: int, device: torch.device) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return [torch.randint(3, vocabulary_size, (1, length)).to(device) for length in _LENGTHS]


def _trained_with(
    model: Any, documents: list[Tensor], dtype: torch.dtype, weights: torch.dtype | None = None
) -> _Trained:
    """Losses and gradients of `model` in `dtype`, with weights rounded to `weights` first."""
    run = copy.deepcopy(model)
    for name, parameter in run.named_parameters():
        parameter.data = model.get_parameter(name).detach().to(weights or dtype).to(dtype)
    with torch.enable_grad():
        losses = [_losses(run, ids) for ids in documents]
        torch.cat(losses).sum().backward()
    gradients = {
        name: parameter.grad.float() for name, parameter in run.named_parameters() if parameter.grad is not None
    }
    return _Trained(torch.cat(losses).detach(), gradients)


def _stage_trained_with(
    run: _Run, model: Any, documents: list[Tensor]
) -> tuple[Tensor, dict[str, Tensor], Mapping[str, ParameterShard]]:
    built = build_stage(
        model.config,
        range(model.config.num_hidden_layers),
        run.group,
        sequence_parallel=run.sequence_parallel,
        recompute=run.recompute,
        dtype=run.dtype,
        device=run.device,
        trust_remote_code=run.trust_remote_code,
    )
    whole = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in built.parameters.items():
            part = built.places[name].part
            parameter.copy_(part.take(whole[name]) if part else whole[name])
    with torch.enable_grad():
        losses = _train_stage(built.stage, documents, model.config.vocab_size, run.group)
    gradients = {
        name: parameter.grad.float() for name, parameter in built.parameters.items() if parameter.grad is not None
    }
    sum_partial(gradients, built.places, run.group)
    return losses, gradients, built.places


def tiny(config: Any, least_layers: int = 2) -> Any:
    """A small configuration of the same class and structure (heads, kinds of layers, norms, biases, caps)."""
    config = without_dropout(config)
    heads = config.num_attention_heads
    old_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = {
        "hidden_size": heads * _HEAD_SIZE,
        "head_dim": _HEAD_SIZE,
        "intermediate_size": heads * 16,
        "ffn_dim": heads * 16,
        "ffn_hidden_size": heads * 16,
        "vocab_size": 131,
        "max_position_embeddings": 64,
    }
    sizes |= family_of(config.model_type).small_sizes(config, heads * _HEAD_SIZE)
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
    """Shorten RoPE scaling factors, of which some kinds have one per pair of a head's features."""
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
            copy.deepcopy(tiny(config)),
            attn_implementation="eager",
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # whatever a model's own constructor raises
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{kind} cannot be made small for the check before training ({type(error).__name__}: {reason}): it "
            "cannot be trained here yet"
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same on every rank
        for parameter in model.parameters():  # norms and biases start as ones and zeros, which would hide mistakes
            torch.nn.init.normal_(parameter, mean=0.05, std=0.15)
    return model.train()


def _losses(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), _targets(ids), reduction="none")


def _targets(ids: Tensor) -> Tensor:
    return ids[0].roll(-1)


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


def _difference(found: Tensor, expected: Tensor, exact: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


def _share_of_rounding(found: Tensor, expected: Tensor, exact: Tensor) -> float:
    """The difference relative to the tolerance: a tenth of the tensor, or a multiple of transformers' own rounding."""
    allowed = max(_ROUNDING_SHARE * float(exact.norm()), _ROUNDING_TIMES * float((expected - exact).norm()), 1e-3)
    return float((found - expected).norm()) / allowed
