"""Merges a base model and adapters into a Hugging Face folder, tensor by tensor, with at most one output file in
memory. Then compares the logits of base with adapters and of the merged model, a few layers at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sft.checkpoint import hf_folder
from sft.checkpoint.adapter import AdapterFiles, check_fits
from sft.model.anatomy import Anatomy, find_anatomy
from sft.model.build import BuiltStage, build_stage, ignored_of, make_on_meta, renames_of
from sft.model.collectives import SingleRank
from sft.model.lora import LoraSettings, is_adapter
from sft.model.stage import Stage
from sft.model.weight_names import match_names
from sft.model.weights import WeightFiles, load
from tokenize_data.errors import UserError

_LAYERS_BYTES = 2_000_000_000  # bytes of layers in memory at once while logits are compared


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """An adapter and its weight in the merge."""

    files: AdapterFiles
    weight: float


@dataclass(frozen=True, kw_only=True)
class Merge:
    """A checked merge; nothing is written yet."""

    base: WeightFiles
    config: Any  # dtype of the result
    adapters: Sequence[Weighted]
    dtype: torch.dtype
    anatomy: Anatomy
    shapes: Mapping[str, tuple[int, ...]]  # of the result
    names: Mapping[str, str]  # the model's names to those in the base's files
    ignored: tuple[str, ...]
    base_prefix: str
    renames: tuple[tuple[str, str], ...]
    trust_remote_code: bool

    def deltas(self, name: str) -> Tensor | None:
        """The sum of what the adapters add to a parameter, in float32."""
        module, _, kind = name.rpartition(".")
        mine = [one for one in self.adapters if kind == "weight" and module in one.files.modules]
        return sum((one.files.delta(module) * one.weight for one in mine), torch.zeros(())) if mine else None

    def replacement(self, name: str) -> Tensor | None:
        """The value of a parameter that was trained in full."""
        return next((one.files.read(name) for one in self.adapters if name in one.files.saved), None)


def plan_merge(
    base: Path, config: Any, adapters: Sequence[Weighted], dtype: torch.dtype, trust_remote_code: bool = False
) -> Merge:
    """Plan the merge. Raises UserError if base and adapters do not fit."""
    _refuse_two_replacements(adapters)
    config, files = copy.deepcopy(config), WeightFiles(base)
    model = make_on_meta(config, dtype, trust_remote_code)
    anatomy = find_anatomy(model)
    embedding, head = f"{anatomy.embedding}.weight", f"{anatomy.head}.weight"
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    is_tied = model.get_submodule(anatomy.head).weight is model.get_submodule(anatomy.embedding).weight
    expected = {name: shape for name, shape in shapes.items() if not (is_tied and name == head)}
    ignored, prefix, renames = ignored_of(model), model.base_model_prefix, renames_of(model)
    names = match_names(
        expected,
        files,
        base_prefix=prefix,
        tied={head: embedding} if is_tied else {},
        ignore=ignored,
        grown={},
        renames=renames,
    )
    rows = _grown_rows(adapters, embedding, head, shapes[embedding][0])
    if rows is not None:
        shapes |= {name: (rows, *shapes[name][1:]) for name in (embedding, head)}
        config.get_text_config().vocab_size = rows
    for one in adapters:
        check_fits(one.files, shapes, anatomy.embedding, anatomy.head)
    if is_tied and _differ(adapters, embedding, head):
        config.tie_word_embeddings, is_tied = False, False
        names[head] = names[embedding]
    shapes = {name: shape for name, shape in shapes.items() if not (is_tied and name == head)}
    return Merge(
        base=files,
        config=config,
        adapters=adapters,
        dtype=dtype,
        anatomy=anatomy,
        shapes=shapes,
        names=names,
        ignored=ignored,
        base_prefix=prefix,
        renames=renames,
        trust_remote_code=trust_remote_code,
    )


def write_merged(merge: Merge, scratch: Path, done: Callable[[int, int], None]) -> None:
    """Write the weights into a hidden folder. `done` receives (tensors written, all tensors)."""
    writer = hf_folder.ShardWriter(scratch, 0)
    for number, name in enumerate(merge.shapes, 1):
        whole, delta = merge.replacement(name), merge.deltas(name)
        if whole is None:
            whole = merge.base.read(merge.names[name], None, merge.dtype if delta is None else torch.float32)
        if delta is not None:
            whole = whole.float() + delta
        in_files = merge.names[name]
        writer.add(
            name if in_files in writer.names else in_files, whole.to(merge.dtype)
        )  # an untied head gets its own name
        done(number, len(merge.shapes))
    hf_folder.finish(scratch, writer.close())


@torch.no_grad()
def largest_difference(merge: Merge, written: Path, documents: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Returns (largest logit difference between base with adapters and merged model, largest logit), in float32, over
    all tokens.
    """
    ids_RT = torch.tensor([[token for document in documents for token in document]])
    positions_RT = torch.tensor([[position for document in documents for position in range(len(document))]])
    result = WeightFiles(written)
    ours, theirs = ids_RT, ids_RT
    for layers in _few_layers(merge):
        is_last = layers.stop == merge.anatomy.num_layers
        ours = _run(_adapted_stage(merge, layers), ours, positions_RT, is_last)
        theirs = _run(_plain_stage(merge, result, layers), theirs, positions_RT, is_last)
    return float((ours - theirs).abs().max()), float(ours.abs().max())


def _run(built: BuiltStage, inputs: Tensor, positions_RT: Tensor, is_last: bool) -> Tensor:
    stage: Stage = built.stage
    stage.eval()
    output = stage((inputs, positions_RT))
    if is_last:
        assert isinstance(output, Tensor)
        hidden = stage.logits(output, torch.arange(positions_RT.size(1)))
    else:
        hidden = output[0]
    return hidden


def _plain_stage(merge: Merge, files: WeightFiles, layers: range) -> BuiltStage:
    built = _build(merge, layers, None)
    names = _names_in(files, built)
    load({name: (parameter, None) for name, parameter in built.parameters.items()}, files, names)
    return built


def _adapted_stage(merge: Merge, layers: range) -> BuiltStage:
    """Base weights with all adapters combined into one: As stacked, Bs side by side, padded with zeros."""
    modules = tuple(dict.fromkeys(module for one in merge.adapters for module in one.files.modules))
    rank = max((sum(_rank(one, module) for one in merge.adapters) for module in modules), default=1)
    lora = LoraSettings(rank=rank, alpha=rank, targets=modules) if modules else None
    built = _build(merge, layers, lora)
    for name, parameter in built.parameters.items():
        if is_adapter(name):
            parameter.copy_(_stacked(merge, name, parameter))
        elif (whole := merge.replacement(name)) is not None:
            parameter.copy_(whole)
        else:
            merge.base.read_into(parameter.data, merge.names[name], None)
    return built


def _stacked(merge: Merge, name: str, like: Tensor) -> Tensor:
    module, kind = name.rsplit(".", 2)[0], name.rsplit(".", 2)[1]
    result, start = torch.zeros(like.shape), 0
    for one in merge.adapters:
        if rank := _rank(one, module):
            part = one.files.read(name).float()
            if kind == "lora_A":
                result[start : start + rank] = part
            else:
                result[:, start : start + rank] = part * (one.weight * one.files.scale(module))
            start += rank
    return result


def _rank(one: Weighted, module: str) -> int:
    return one.files.shape(f"{module}.lora_A.weight")[0] if module in one.files.modules else 0


def _build(merge: Merge, layers: range, lora: LoraSettings | None) -> BuiltStage:
    return build_stage(
        merge.config,
        layers,
        SingleRank(),
        sequence_parallel=False,
        recompute="none",
        dtype=torch.float32,
        device=torch.device("cpu"),
        trust_remote_code=merge.trust_remote_code,
        lora=lora,
    )


def _names_in(files: WeightFiles, built: BuiltStage) -> dict[str, str]:
    head, embedding = f"{built.anatomy.head}.weight", f"{built.anatomy.embedding}.weight"
    return match_names(
        {name: place.shape for name, place in built.all_places.items()},
        files,
        base_prefix=built.base_prefix,
        tied={head: embedding} if built.tied_name else {},
        ignore=built.ignored,
        grown={},
        renames=built.renames,
    )


def _few_layers(merge: Merge) -> list[range]:
    """Choose how many layers fit into memory at once."""
    total = merge.anatomy.num_layers
    prefix = f"{merge.anatomy.layers}.0."
    one = sum(4 * torch.Size(shape).numel() for name, shape in merge.shapes.items() if name.startswith(prefix))
    step = max(1, _LAYERS_BYTES // max(one, 1))
    return [range(start, min(start + step, total)) for start in range(0, total, step)]


def _refuse_two_replacements(adapters: Sequence[Weighted]) -> None:
    saving = [one for one in adapters if one.files.saved]
    if len(saving) > 1 or any(one.weight != 1 for one in saving):
        folders = ", ".join(str(one.files.folder) for one in saving)
        raise UserError(
            f"{folders}: modules that were trained in full cannot be added up or weighted: merge one such "
            "adapter, with weight 1"
        )


def _grown_rows(adapters: Sequence[Weighted], embedding: str, head: str, rows: int) -> int | None:
    """Rows of an extended vocabulary: embedding and head are part of the adapter and have the same number of rows."""
    for one in adapters:
        sizes = {one.files.shape(name)[0] for name in (embedding, head) if name in one.files.saved}
        if len(sizes) == 1 and {embedding, head} <= set(one.files.saved) and (found := sizes.pop()) > rows:
            return found
    return None


def _differ(adapters: Sequence[Weighted], embedding: str, head: str) -> bool:
    """Whether an adapter untied embedding and head."""
    for one in adapters:
        both = [name for name in (embedding, head) if name in one.files.saved]
        if len(both) == 1 or (both and not torch.equal(one.files.read(embedding), one.files.read(head))):
            return True
        if head.removesuffix(".weight") in one.files.modules:
            return True
    return False
