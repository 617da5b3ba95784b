"""Assigns each tensor-parallel rank its parts of a model's parameters, by the plan in the model's configuration or by
our own.

Works on a model on the meta device: parameters are replaced by smaller ones, linear layers by parallel ones, nothing is
read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sft.families.table import family_of
from sft.model.anatomy import Anatomy
from sft.model.collectives import TensorGroup
from sft.model.parallel_layers import ColumnParallel, RowParallel, ShardedRMSNorm, enters_region, split_vocabulary
from sft.model.slices import Slice
from tokenize_data.errors import UserError

_QKV_NAMES = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "out_proj", "o_proj", "dense")
_COLUMN_STYLES = ("colwise", "colwise_gather_output", "colwise_query_key_value", "colwise_halves")
_ROW_STYLES = ("rowwise", "rowwise_split_input")
_STYLES = (*_COLUMN_STYLES, *_ROW_STYLES, "replicated_with_grad_allreduce", "norm_over_heads")


@dataclass(frozen=True)
class ParameterShard:
    """A rank's shard of a parameter: its shape in the whole model, its own part, and how its gradient is completed."""

    shape: tuple[int, ...]
    part: Slice | None = None  # None: all of it, on every rank
    is_partial: bool = False  # each rank's gradient is a partial sum

    @property
    def is_replica_of_part(self) -> bool:
        """Whether several, but not all, ranks hold this part and a share of its gradient."""
        return self.part is not None and self.is_partial


def layer_plan(config: Any) -> dict[str, str]:
    """Returns {module within a layer: style}. Raises UserError for models without a plan or with unknown styles."""
    plan = dict(family_of(config.model_type).tensor_plan(config) or {})
    if not plan:
        given = getattr(config, "base_model_tp_plan", None) or {}
        plan = {name.partition(".*.")[2]: style for name, style in given.items() if ".*." in name}
    if not plan:
        raise UserError(
            f"models of type {config.model_type} have no tensor-parallel plan: use --tp 1, and --pp to split the model"
        )
    unknown = {f"{name}: {style}" for name, style in plan.items() if style not in _STYLES}
    if unknown:
        listing = ", ".join(sorted(unknown)[:3])
        raise UserError(f"the tensor-parallel plan of {config.model_type} uses unknown styles ({listing}): use --tp 1")
    return plan


def parallelise(model: Any, anatomy: Anatomy, group: TensorGroup, sequence_parallel: bool) -> dict[str, ParameterShard]:
    """Reduce `model` (on meta) to this rank's part. Returns the shard of each parameter, by Hugging Face name."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if group.size == 1:
        return {name: ParameterShard(shape) for name, shape in shapes.items()}
    plan, partial = layer_plan(model.config), set[str]()
    parts: dict[str, Slice] = {}
    for number, layer in enumerate(model.get_submodule(anatomy.layers)):
        builder = _LayerBuilder(layer, f"{anatomy.layers}.{number}", model.config, group, sequence_parallel)
        builder.apply(plan)
        parts |= builder.parts
        partial |= builder.partial
    parts |= _split_vocabulary(model, anatomy, group)
    if sequence_parallel:
        partial |= {name for name in shapes if name.startswith(anatomy.final)}
    return {name: ParameterShard(shape, parts.get(name), name in partial) for name, shape in shapes.items()}


class _LayerBuilder:
    """Reduces one layer to a rank's part, and records its parameters' shards."""

    def __init__(self, layer: nn.Module, name: str, config: Any, group: TensorGroup, sequence_parallel: bool) -> None:
        self.layer, self.name, self.config, self.group, self.sequence_parallel = (
            layer,
            name,
            config,
            group,
            sequence_parallel,
        )
        self.parts: dict[str, Slice] = {}
        self.partial: set[str] = set()

    def apply(self, plan: Mapping[str, str]) -> None:
        present = {name: style for name, style in plan.items() if _has(self.layer, name)}
        regions, whole_inside = set[str](), set[str]()
        for name, style in present.items():
            parent = name.rpartition(".")[0]
            if style in _COLUMN_STYLES:
                self._column(name, style)
                if parent:
                    regions.add(parent)
                else:
                    module = self.layer.get_submodule(name)
                    module.register_forward_pre_hook(
                        enters_region(self.group, self.sequence_parallel), with_kwargs=True
                    )
            elif style in _ROW_STYLES:
                self._row(name, style)
            elif style == "norm_over_heads":
                self._norm(name)
            if style == "colwise_gather_output":
                whole_inside.add(parent)
        for region in regions:
            module = self.layer.get_submodule(region)
            module.register_forward_pre_hook(enters_region(self.group, self.sequence_parallel), with_kwargs=True)
            if region not in whole_inside:
                self._localise_heads(module)
        self._note_partial(present, regions, whole_inside)

    def _note_partial(self, plan: Mapping[str, str], regions: Iterable[str], whole_inside: Iterable[str]) -> None:
        """Mark parameters whose gradients are partial sums: inside regions, and everywhere if tokens are split."""
        rows = {name for name, style in plan.items() if style in _ROW_STYLES}
        inside = set(whole_inside)
        for key, _ in self.layer.named_parameters():
            full = f"{self.name}.{key}"
            if full in self.parts:
                continue
            owner = key.rpartition(".")[0]
            region = next((name for name in regions if owner == name or owner.startswith(f"{name}.")), None)
            is_outside = owner in rows or region is None
            if (is_outside and self.sequence_parallel) or (not is_outside and str(region) not in inside):
                self.partial.add(full)

    def _column(self, name: str, style: str) -> None:
        linear = self._linear(name)
        pieces, is_replica, is_owner = self._pieces(name, style, linear.out_features)
        part = Slice(dim=0, pieces=pieces, is_owner=is_owner)
        weight, bias = _shrunk(linear.weight, part), _shrunk(linear.bias, part) if linear.bias is not None else None
        new = ColumnParallel(weight, bias, self.group, gather_output=style == "colwise_gather_output")
        self._replace(name, new, {"weight": part} | ({"bias": part} if bias is not None else {}))
        if is_replica:
            self.partial |= {f"{self.name}.{name}.{key}" for key, _ in new.named_parameters()}

    def _row(self, name: str, style: str) -> None:
        linear = self._linear(name)
        part = Slice(dim=1, pieces=(_even(linear.in_features, self.group, f"{self.name}.{name}"),))
        new = RowParallel(
            _shrunk(linear.weight, part),
            linear.bias,
            self.group,
            split_input=style == "rowwise_split_input",
            stretches=self.sequence_parallel,
        )
        self._replace(name, new, {"weight": part})

    def _norm(self, name: str) -> None:
        norm: Any = self.layer.get_submodule(name)
        part = Slice(dim=0, pieces=(_even(norm.weight.numel(), self.group, f"{self.name}.{name}"),))
        new = ShardedRMSNorm(_shrunk(norm.weight, part), norm.variance_epsilon, self.group)
        self._replace(name, new, {"weight": part})

    def _pieces(self, name: str, style: str, features: int) -> tuple[tuple[tuple[int, int], ...], bool, bool]:
        """Returns (this rank's rows, whether other ranks have them too, whether this is the first of them)."""
        where, config, group = f"{self.name}.{name}", self.config, self.group
        if style == "colwise_query_key_value":
            heads, groups = config.num_attention_heads, config.num_key_value_heads
            size = features // (heads + 2 * groups)
            _check_heads(heads, groups, group.size, replicate=False)
            starts, units = (0, heads * size, (heads + groups) * size), (heads, groups, groups)
            spans = [_even(unit * size, group, where) for unit in units]
            return tuple((at + a, at + b) for at, (a, b) in zip(starts, spans, strict=True)), False, True
        if style == "colwise_halves":
            start, stop = _even(features // 2, group, where)
            return ((start, stop), (features // 2 + start, features // 2 + stop)), False, True
        if style == "colwise" and name.rpartition(".")[2] in ("k_proj", "v_proj"):
            heads, groups = (
                config.num_attention_heads,
                getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            )
            _check_heads(heads, groups, group.size, replicate=self._has_no_norm_over_heads())
            if groups < group.size:
                size, copies = features // groups, group.size // groups
                head = group.rank // copies
                return ((head * size, (head + 1) * size),), True, group.rank % copies == 0
        if style == "colwise" and name.rpartition(".")[2] == "query_key_value":
            _check_heads(
                config.num_attention_heads,
                family_of(config.model_type).key_value_heads(config),
                group.size,
                replicate=False,
            )
        return (_even(features, group, where),), False, True

    def _has_no_norm_over_heads(self) -> bool:
        return "norm_over_heads" not in layer_plan(self.config).values()

    def _localise_heads(self, module: Any) -> None:
        """Set attention modules' head counts, in attributes or in the configuration, to this rank's."""
        if not any(hasattr(module, name) for name in _QKV_NAMES):
            return
        config, size = self.config, self.group.size
        heads, groups = config.num_attention_heads, _key_value_heads(config)
        local_heads, local_groups = heads // size, max(groups // size, 1)
        replaced = {"num_heads": local_heads, "num_kv_heads": local_groups, "num_key_value_heads": local_groups}
        replaced |= {"num_attention_heads": local_heads, "num_key_value_groups": local_heads // local_groups}
        for name, value in replaced.items():
            if hasattr(module, name):
                setattr(module, name, value)
        if hasattr(module, "qkv_proj"):  # Phi-3 reads the number of heads from its configuration
            module.config = copy.copy(module.config)
            module.config.num_attention_heads, module.config.num_key_value_heads = local_heads, local_groups

    def _linear(self, name: str) -> nn.Linear:
        module = self.layer.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise UserError(
                f"{self.name}.{name} is a {type(module).__name__}, not a linear layer: this model needs --tp 1"
            )
        return module

    def _replace(self, name: str, module: nn.Module, parts: Mapping[str, Slice]) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.layer.get_submodule(parent), child, module)
        self.parts |= {f"{self.name}.{name}.{key}": part for key, part in parts.items()}


def _split_vocabulary(model: Any, anatomy: Anatomy, group: TensorGroup) -> dict[str, Slice]:
    """Split embedding and head by rows of the vocabulary, padded to a multiple of the ranks."""
    embedding, head = model.get_submodule(anatomy.embedding), model.get_submodule(anatomy.head)
    rows = -(-embedding.num_embeddings // group.size)
    part = Slice(dim=0, pieces=((group.rank * rows, (group.rank + 1) * rows),))
    weight = _shrunk(embedding.weight, part)
    is_tied = head.weight is embedding.weight
    split_vocabulary(embedding, weight, group.rank * rows, group)
    head.weight = weight if is_tied else _shrunk(head.weight, part)
    head.out_features = rows
    parts = {f"{anatomy.embedding}.weight": part, f"{anatomy.head}.weight": part}
    if head.bias is not None:
        head.bias = _shrunk(head.bias, part)
        parts[f"{anatomy.head}.bias"] = part
    return parts


def _shrunk(parameter: Tensor, part: Slice) -> nn.Parameter:
    shape = list(parameter.shape)
    shape[part.dim] = part.length
    return nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device=parameter.device))


def _even(features: int, group: TensorGroup, where: str) -> tuple[int, int]:
    if features % group.size:
        fitting = ", ".join(str(size) for size in range(1, min(features, 64) + 1) if features % size == 0)
        raise UserError(f"{where} has {features} features, which --tp {group.size} does not divide: use --tp {fitting}")
    share = features // group.size
    return group.rank * share, (group.rank + 1) * share


def _key_value_heads(config: Any) -> int:
    return family_of(config.model_type).key_value_heads(config)


def _check_heads(heads: int, groups: int, size: int, replicate: bool) -> None:
    fits = heads % size == 0 and (groups % size == 0 or (replicate and size % groups == 0))
    if not fits:
        fitting = [
            n for n in range(1, heads + 1) if heads % n == 0 and (groups % n == 0 or (replicate and n % groups == 0))
        ]
        raise UserError(
            f"--tp {size} does not divide {heads} heads and {groups} key-value heads: use --tp "
            f"{', '.join(map(str, fitting))}"
        )


def _has(module: nn.Module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True
