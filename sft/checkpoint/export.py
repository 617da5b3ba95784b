"""Exports the stages in memory as a Hugging Face folder. Each stage writes its own files tensor by tensor, so no
process holds the whole model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sft.checkpoint import hf_folder
from sft.checkpoint.fragments import Checkpoint
from sft.engine.pipeline import Pipeline
from sft.optimizer.shards import whole_of
from sft.optimizer.states import MASTER


@dataclass(frozen=True, kw_only=True)
class Origins:
    """Inputs of an export besides the weights."""

    config: Any  # of transformers
    generation_config: Any | None
    tokenizer_folder: Path
    names: Mapping[str, str]  # names of parameters in files, if they differ from the model's
    facts: Mapping[str, Any]  # for training.json


def export(pipeline: Pipeline, target: Path, origins: Origins) -> None:
    """Export the model; `target` appears once it is complete. A collective call."""
    scratch = target.with_name(f".{target.name}.part")
    processes = pipeline.processes
    if processes.rank == 0 and scratch.exists():
        shutil.rmtree(scratch)
    dist.barrier()
    parts = _write_stage(pipeline, scratch, origins.names) if processes.replica == 0 else []
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, parts)
    if processes.rank == 0:
        hf_folder.finish(scratch, [part for parts in everyone for part in parts])
        write_surroundings(scratch, origins, next(iter(pipeline.built.parameters.values())).dtype)
        hf_folder.publish(scratch, target, overwrite=True)
    dist.barrier()


def export_checkpoint(
    checkpoint: Checkpoint, target: Path, origins: Origins, dtype: torch.dtype, done: Callable[[int, int], None]
) -> None:
    """Export from a checkpoint's files, in one process and tensor by tensor. `done` receives (tensors written, all
    tensors).
    """
    scratch = target.with_name(f".{target.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    writer = hf_folder.ShardWriter(scratch, 0)
    names = checkpoint.names()
    for number, name in enumerate(names, 1):
        writer.add(origins.names.get(name, name), checkpoint.read(name, MASTER).to(dtype))
        done(number, len(names))
    hf_folder.finish(scratch, writer.close())
    write_surroundings(scratch, origins, dtype)
    hf_folder.publish(scratch, target)


def write_surroundings(folder: Path, origins: Origins, dtype: torch.dtype) -> None:
    """Write everything except the weights."""
    vocabulary = origins.config.get_text_config().vocab_size
    hf_folder.write_config(folder, origins.config, origins.generation_config, dtype, vocabulary)
    hf_folder.copy_tokenizer(origins.tokenizer_folder, folder)
    hf_folder.stop_at_turns(folder)
    hf_folder.write_training(folder, origins.facts)


def _write_stage(pipeline: Pipeline, scratch: Path, names: Mapping[str, str]) -> list[dict[str, Any]]:
    processes, built = pipeline.processes, pipeline.built
    writer = hf_folder.ShardWriter(scratch, processes.stage) if processes.tensor.rank == 0 else None
    for name, parameter in built.parameters.items():
        if name == built.tied_name and not processes.is_first_stage:
            continue  # the first stage has it
        whole = whole_of(parameter.detach(), built.places[name], processes.tensor)
        if writer is not None:
            writer.add(names.get(name, name), whole)
    return writer.close() if writer is not None else []
