"""Low-rank adapters (LoRA) on a model that is cut to this rank's size: where they go, which part of them a rank holds,
how they begin.

A column-parallel layer has all of A on every rank, each seeing a part of its gradient, and a slice of B like that of
the weight. A row-parallel one has a slice of A, and all of B. Sums over ranks are those that the layer makes anyway.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sft.model.anatomy import Anatomy
from sft.model.collectives import TensorGroup
from sft.model.dropout import AdapterDropout, Keys
from sft.model.linear import Linear
from sft.model.tensor_parallel import ParameterShard
from tokenize_data.errors import UserError

ALL_LINEAR = "all-linear"
A, B = "lora_A.weight", "lora_B.weight"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The adapters that are trained instead of the weights."""

    rank: int
    alpha: float
    dropout: float = 0.0  # dropout of the inputs of adapters within the layers
    targets: tuple[str, ...] = (ALL_LINEAR,)
    modules_to_save: tuple[str, ...] = ()  # modules that are trained in full
    is_rank_stabilised: bool = False  # scale by alpha / sqrt(rank)
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.is_rank_stabilised else self.rank)


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """The adapters of a whole model."""

    settings: LoraSettings
    linear: tuple[str, ...]  # names of all linear layers
    modules: tuple[str, ...]  # those with adapters
    saved: tuple[str, ...]  # modules that are trained in full
    places: Mapping[str, ParameterShard]  # shards of A and B, by name


def adapt(
    model: Any,
    anatomy: Anatomy,
    settings: LoraSettings,
    places: Mapping[str, ParameterShard],
    keys: Keys,
    group: TensorGroup,
) -> Adapted:
    """Freeze a model (on meta, made parallel) and add adapters. `places` are those of its parameters."""
    tied = model.get_submodule(anatomy.head).weight is model.get_submodule(anatomy.embedding).weight
    linear = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear | Linear))
    modules = choose_targets(model, anatomy, settings.targets, is_tied=tied)
    saved = choose_saved(model, anatomy, settings.modules_to_save, modules, is_tied=tied)
    model.requires_grad_(False)
    for name in saved:
        model.get_submodule(name).requires_grad_(True)
    made: dict[str, ParameterShard] = {}
    for name in modules:
        layer = as_linear(model, name)
        weight, place = layer.weight, places[f"{name}.weight"]
        assert weight is not None
        rows, columns = weight.shape
        a, b = (
            nn.Parameter(torch.empty(shape, dtype=weight.dtype, device="meta"))
            for shape in ((settings.rank, columns), (rows, settings.rank))
        )
        layer.add_adapter(a, b, settings.scale)
        if settings.dropout and name.startswith(f"{anatomy.layers}."):
            part = place.part if place.part is not None and place.part.dim == 1 else None
            layer.dropout = AdapterDropout(keys, name, settings.dropout, columns, part, (group.rank, group.size))
        made |= _places(name, place, settings.rank)
    return Adapted(settings=settings, linear=linear, modules=modules, saved=saved, places=made)


def as_linear(model: Any, name: str) -> Linear:
    """Return the layer of that name, replaced by ours if it is torch's."""
    module = model.get_submodule(name)
    if isinstance(module, Linear):
        return module
    assert isinstance(module, nn.Linear), name
    assert isinstance(module.weight, nn.Parameter), name
    parent, _, child = name.rpartition(".")
    new = Linear(module.weight, module.bias)
    setattr(model.get_submodule(parent), child, new)
    return new


def choose_targets(model: Any, anatomy: Anatomy, targets: Sequence[str], *, is_tied: bool) -> tuple[str, ...]:
    """Names of the linear layers that get adapters: `all-linear` means all but the head; a name means all that end in
    it.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Linear)]
    chosen: set[str] = set()
    for target in targets:
        found = (
            {name for name in linear if name != anatomy.head}
            if target == ALL_LINEAR
            else {n for n in linear if _ends_in(n, target)}
        )
        if not found:
            raise UserError(_no_target(model, target, linear))
        chosen |= found
    if anatomy.head in chosen and is_tied:
        raise UserError(
            f"--lora_targets {anatomy.head}: this model's head is its embedding, so an adapter on one would be "
            "missing in the other: "
            f"use --lora_modules_to_save {anatomy.head}"
        )
    return tuple(name for name in linear if name in chosen)


def choose_saved(
    model: Any, anatomy: Anatomy, wanted: Sequence[str], adapted: Collection[str], *, is_tied: bool
) -> tuple[str, ...]:
    """Names of the modules that are trained in full. Tied embedding and head are both included or both not."""
    with_weights = [
        name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None
    ]
    chosen: set[str] = set()
    for word in wanted:
        found = {name for name in with_weights if _ends_in(name, word)}
        if not found:
            raise UserError(f"--lora_modules_to_save {word}: no module matches; there are {_kinds(with_weights)}")
        if both := found & set(adapted):
            raise UserError(
                f"{min(both)} would have an adapter and be trained in full: take it out of one of "
                "--lora_targets, --lora_modules_to_save"
            )
        chosen |= found
    ends = {anatomy.embedding, anatomy.head}
    if is_tied and chosen & ends:
        if getattr(model.get_submodule(anatomy.head), "bias", None) is not None:
            raise UserError(
                f"--lora_modules_to_save {min(chosen & ends)}: this model's head is its embedding plus a bias, and "
                f"PEFT drops that bias when it loads such an adapter: leave {min(chosen & ends)} out, or train without "
                "--lora"
            )
        chosen |= ends
    return tuple(name for name in with_weights if name in chosen)


def initial(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """All of A or B before training: A as PEFT draws it (uniform, by its number of inputs), the same on every layout; B
    is zero.
    """
    if not name.endswith(A):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def initialise(parameters: Mapping[str, nn.Parameter], places: Mapping[str, ParameterShard], seed: int) -> None:
    """Initialise this rank's parts of all adapters."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            if is_adapter(name):
                place = places[name]
                whole = initial(name, place.shape, seed)
                parameter.copy_(place.part.take(whole) if place.part else whole)


def is_adapter(name: str) -> bool:
    return name.endswith((f".{A}", f".{B}"))


def _places(name: str, place: ParameterShard, rank: int) -> dict[str, ParameterShard]:
    rows, columns = place.shape
    if place.part is None:
        a = ParameterShard((rank, columns), None, place.is_partial)
        b = ParameterShard((rows, rank), None, place.is_partial)
    elif place.part.dim == 0:
        a = ParameterShard((rank, columns), None, True)
        b = ParameterShard((rows, rank), place.part, place.is_partial)
    else:
        a = ParameterShard((rank, columns), place.part, False)
        b = ParameterShard((rows, rank), None, True)
    return {f"{name}.{A}": a, f"{name}.{B}": b}


def _ends_in(name: str, word: str) -> bool:
    return name == word or name.endswith(f".{word}")


def _no_target(model: Any, target: str, linear: Sequence[str]) -> str:
    other = next((name for name, _ in model.named_modules() if name and _ends_in(name, target)), None)
    kind = (
        f"{other} is not a linear layer; to train it in full, use --lora_modules_to_save {target}"
        if other
        else "no layer matches"
    )
    return f"--lora_targets {target}: {kind}; linear layers are {_kinds(linear)}, or {ALL_LINEAR} for all but the head"


def _kinds(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
