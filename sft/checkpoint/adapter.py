"""Reads and writes adapters in PEFT's format: adapter_config.json and one file of matrices. A parameter's name is the
model's own with the prefix `base_model.model.`, such as `...q_proj.lora_A.weight`, or the weight's name for a
module that is trained in full.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sft.checkpoint import hf_folder
from sft.checkpoint.adapter_config import CONFIG, PREFIX, WEIGHTS, AdapterConfig, config_content, read_adapter_config
from sft.checkpoint.fragments import Checkpoint
from sft.engine.pipeline import Pipeline
from sft.model.lora import A, Adapted, is_adapter
from sft.model.tensor_parallel import ParameterShard
from sft.optimizer.shards import whole_of
from sft.optimizer.states import MASTER
from tokenize_data.errors import UserError, shorten


@dataclass(frozen=True, kw_only=True)
class AdapterOrigins:
    """What an adapter's folder contains besides its matrices."""

    config: Mapping[str, Any]  # of PEFT
    tokenizer_folder: Path
    facts: Mapping[str, Any]  # for training.json


class AdapterFiles:
    """Reads an adapter's matrices one by one, under the model's own names."""

    def __init__(self, folder: Path) -> None:
        self.config: AdapterConfig = read_adapter_config(folder)
        self.folder, path = folder, folder / WEIGHTS
        if not path.is_file():
            pickled = (folder / "adapter_model.bin").is_file()
            hint = (
                "a pickle can run any program and is not read: save it with PEFT's save_pretrained"
                if pickled
                else "fetch the adapter again"
            )
            raise UserError(f"{folder} has no {WEIGHTS}: {hint}")
        try:
            file: Any = safe_open(path, "pt")
            keys: list[str] = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} is not a complete safetensors file ({shorten(error, 120)}): fetch the adapter again"
            ) from error
        self._file = file
        # If the head has an adapter, PEFT also stores the head itself.
        self._keys = {key.removeprefix(PREFIX).replace(".base_layer.", "."): key for key in keys}
        self.modules = sorted(name.removesuffix(f".{A}") for name in self._keys if name.endswith(f".{A}"))
        self.saved = sorted(name for name in self._keys if not is_adapter(name))
        strange = [name for name in self._keys if "lora_" in name and not is_adapter(name)]
        lonely = [name for name in self.modules if f"{name}.lora_B.weight" not in self._keys]
        if strange or lonely or not (self.modules or self.saved):
            what = f"it has {strange[0]}" if strange else f"{lonely[0]} has no lora_B" if lonely else "it has none"
            raise UserError(
                f"{path} does not hold adapters of linear layers alone ({what}): use PEFT's merge_and_unload"
            )

    def names(self) -> list[str]:
        return list(self._keys)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(self._keys[name]).get_shape())

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(self._keys[name])
        return tensor

    def scale(self, module: str) -> float:
        return self.config.scale(module, self.shape(f"{module}.{A}")[0])

    def delta(self, module: str) -> Tensor:
        """The difference that the adapter adds to a weight, in float32."""
        a_RI, b_OR = self.read(f"{module}.{A}").float(), self.read(f"{module}.lora_B.weight").float()
        return (b_OR @ a_RI) * self.scale(module)


def check_fits(adapter: AdapterFiles, shapes: Mapping[str, tuple[int, ...]], embedding: str, head: str) -> None:
    """Raise UserError if the adapter does not fit the base model's parameter `shapes` or its vocabulary."""
    for module in adapter.modules:
        weight = shapes.get(f"{module}.weight")
        made = (adapter.shape(f"{module}.lora_B.weight")[0], adapter.shape(f"{module}.{A}")[1])
        if weight is None:
            raise UserError(
                f"{adapter.folder} has an adapter for {module}, which this base model does not have: give "
                f"{_base(adapter)}"
            )
        if weight != made:
            sizes = f"{list(made)}, the base model's is {list(weight)}"
            if module in (embedding, head):
                raise UserError(
                    f"{adapter.folder} is for a vocabulary of {made[0]:,} tokens, the base model has "
                    f"{weight[0]:,}: give {_base(adapter)}"
                )
            raise UserError(f"{adapter.folder} is for a {module} of {sizes}: give {_base(adapter)}")
    for name in adapter.saved:
        there, here = adapter.shape(name), shapes.get(name)
        if here is None:
            raise UserError(
                f"{adapter.folder} holds {name}, which this base model does not have: give {_base(adapter)}"
            )
        if there != here:
            if name.startswith((f"{embedding}.", f"{head}.")):
                raise UserError(
                    f"{adapter.folder} has a vocabulary of {there[0]:,} tokens, the base model one of {here[0]:,}: "
                    f"give {_base(adapter)}, with the tokenizer that the adapter was trained with"
                )
            raise UserError(
                f"{adapter.folder} has {name} as {list(there)}, the base model as {list(here)}: give {_base(adapter)}"
            )


def load_adapter(
    adapter: AdapterFiles,
    parameters: Mapping[str, nn.Parameter],
    places: Mapping[str, ParameterShard],
    spellings: Mapping[str, str],
) -> None:
    """Load this rank's parts of the trained parameters. `spellings` maps a name to an alternative in the adapter's
    file.
    """
    present = set(adapter.names())
    with torch.no_grad():
        for name, parameter in parameters.items():
            found = name if name in present else spellings.get(name, name)
            if parameter.requires_grad and found in present:
                whole, part = adapter.read(found), places[name].part
                parameter.copy_(part.take(whole) if part is not None else whole)


def write_adapter(pipeline: Pipeline, target: Path, origins: AdapterOrigins) -> None:
    """Write the adapter; `target` appears once it is complete. A collective call."""
    scratch, processes, built = target.with_name(f".{target.name}.part"), pipeline.processes, pipeline.built
    if processes.rank == 0:
        shutil.rmtree(scratch, ignore_errors=True)
    dist.barrier()
    if processes.replica == 0:
        writer = hf_folder.ShardWriter(scratch, processes.stage) if processes.tensor.rank == 0 else None
        for name, parameter in built.parameters.items():
            if parameter.requires_grad and not (name == built.tied_name and not processes.is_first_stage):
                whole = whole_of(parameter.detach(), built.places[name], processes.tensor)
                if writer is not None:
                    for spelled in spelled_out(name, built.tied_name, built.anatomy.head):
                        writer.add(f"{PREFIX}{spelled}", whole.clone())
        if writer is not None:
            writer.close()
    dist.barrier()
    if processes.rank == 0:
        _finish(scratch, target, origins)
    dist.barrier()


def export_adapter(
    checkpoint: Checkpoint,
    target: Path,
    origins: AdapterOrigins,
    dtype: torch.dtype,
    tied: tuple[str | None, str],
    done: Callable[[int, int], None],
) -> None:
    """Write an adapter from a checkpoint's files. `tied` names the embedding's weight and the head that shares it."""
    scratch, names = target.with_name(f".{target.name}.part"), checkpoint.names()
    shutil.rmtree(scratch, ignore_errors=True)
    writer = hf_folder.ShardWriter(scratch, 0)
    for number, name in enumerate(names, 1):
        whole = checkpoint.read(name, MASTER).to(dtype)
        for spelled in spelled_out(name, *tied):
            writer.add(f"{PREFIX}{spelled}", whole.clone())
        done(number, len(names))
    writer.close()
    _finish(scratch, target, origins, overwrite=False)


def spelled_out(name: str, tied_name: str | None, head: str) -> list[str]:
    """The names under which a tied weight is written: PEFT expects a copy for head and embedding."""
    return [name, f"{head}.weight"] if name == tied_name else [name]


def adapter_config_of(adapted: Adapted, base: str) -> dict[str, Any]:
    settings = adapted.settings
    return config_content(
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        is_rank_stabilised=settings.is_rank_stabilised,
        base=base,
        modules=adapted.modules,
        all_linear=adapted.linear,
        saved=adapted.saved,
    )


def _finish(scratch: Path, target: Path, origins: AdapterOrigins, *, overwrite: bool = True) -> None:
    """Join the stages' files into the single one that PEFT reads. Adapters are small."""
    parts = sorted(scratch.glob("part-*.safetensors"))
    writer, tensors = hf_folder.ShardWriter(scratch, 9999, limit_bytes=2**62), dict[str, Tensor]()
    for part in parts:
        with safe_open(part, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # safetensors' file is no mapping
    for name in sorted(tensors):
        writer.add(name, tensors[name])
    (made,) = writer.close()
    (scratch / made["file"]).rename(scratch / WEIGHTS)
    for part in parts:
        part.unlink()
    hf_folder.write_json(scratch / CONFIG, origins.config)
    hf_folder.copy_tokenizer(origins.tokenizer_folder, scratch)
    hf_folder.write_training(scratch, origins.facts)
    hf_folder.publish(scratch, target, overwrite=overwrite)


def _base(adapter: AdapterFiles) -> str:
    return (
        f"the base that it was made for ({adapter.config.base})"
        if adapter.config.base
        else "the base that it was made for"
    )
