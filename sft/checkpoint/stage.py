"""Loads this process's stage: the base model's weights and initial adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sft.checkpoint import stage_adapters
from sft.checkpoint.adapter import AdapterFiles
from sft.engine.groups import Processes
from sft.model.build import BuiltStage, build_stage
from sft.model.lora import is_adapter
from sft.model.quantized import fill
from sft.model.weight_names import match_names
from sft.model.weights import WeightFiles, load
from sft.spec.run import RunSpec
from tokenize_data.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class LoadedBase:
    """The base model's configuration, extended to the tokenizer's size."""

    config: Any
    generation_config: Any | None


def read_base(spec: RunSpec) -> LoadedBase:
    from transformers import AutoConfig, GenerationConfig

    trust = spec.settings.model.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(spec.base.folder, trust_remote_code=trust)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"{spec.base.folder} has code of its own, which is not run: read it, then use --trust_remote_code, or "
            "use another base model"
        ) from error
    config.vocab_size = max(config.vocab_size, spec.vocabulary_size)
    has_generation = (spec.base.folder / "generation_config.json").exists()
    generation = GenerationConfig.from_pretrained(spec.base.folder) if has_generation else None
    return LoadedBase(config=config, generation_config=generation)


def load_stage(
    spec: RunSpec, base: LoadedBase, processes: Processes, device: torch.device, given: AdapterFiles | None = None
) -> tuple[BuiltStage, dict[str, str]]:
    """Load this process's stage. Returns it with each parameter's name in the base's files. `given` is an adapter to
    start from.
    """
    layers = spec.stages[processes.stage]
    built = build_stage(
        base.config,
        layers,
        processes.tensor,
        sequence_parallel=spec.layout.sequence_parallel,
        recompute=spec.recompute,
        dtype=DTYPES[spec.dtype],
        device=device,
        trust_remote_code=spec.settings.model.trust_remote_code,
        lora=stage_adapters.settings_of(spec.settings, given),
        quantisation=spec.settings.adapters.quantisation,
    )
    stage_adapters.check_vocabulary(built, int(spec.base.config["vocab_size"]), base.config.vocab_size)
    files = WeightFiles(spec.base.folder)
    anatomy = built.anatomy
    head, embedding = f"{anatomy.head}.weight", f"{anatomy.embedding}.weight"
    grown = {
        name: base.config.vocab_size for name in (embedding, head, f"{anatomy.head}.bias") if name in built.all_places
    }
    names = match_names(
        {name: place.shape for name, place in built.all_places.items()},
        files,
        base_prefix=built.base_prefix,
        tied={head: embedding} if built.tied_name else {},
        ignore=built.ignored,
        grown=grown,
        renames=built.renames,
    )
    own = {
        name: (parameter, built.places[name].part)
        for name, parameter in built.parameters.items()
        if not is_adapter(name)
    }
    load(own, files, names, grown=grown)
    fill(built.quantized, built.places, lambda name, part: files.read(names[name], part, DTYPES[spec.dtype]))
    stage_adapters.begin(built, given)
    return built, names
