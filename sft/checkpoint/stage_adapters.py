"""The adapters of a stage: settings, initial values, and the facts for checkpoints."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from sft.checkpoint.adapter import AdapterFiles, adapter_config_of, check_fits, load_adapter
from sft.config.settings import Settings
from sft.model.build import BuiltStage
from sft.model.lora import LoraSettings, initialise
from sft.spec.run import RunSpec
from tokenize_data.errors import UserError


def settings_of(settings: Settings, given: AdapterFiles | None) -> LoraSettings | None:
    """The adapters to build; None in full fine-tuning."""
    if settings.adapters.lora is None:
        return None
    targets, saved = settings.adapters.lora_targets, settings.adapters.lora_modules_to_save
    if given is not None:
        targets, saved = tuple(given.modules), tuple(dict.fromkeys(name.rpartition(".")[0] for name in given.saved))
        saved = tuple(name for name in saved if name not in targets)
    return LoraSettings(
        rank=settings.adapters.lora,
        alpha=settings.adapters.alpha,
        dropout=settings.adapters.lora_dropout,
        targets=targets,
        modules_to_save=saved,
        is_rank_stabilised=settings.adapters.lora_rslora,
        seed=settings.data.seed,
    )


def begin(built: BuiltStage, given: AdapterFiles | None) -> None:
    """Set the adapters' initial values."""
    if built.adapted is None:
        return
    initialise(built.parameters, built.places, built.adapted.settings.seed)
    if given is not None:
        embedding, head = built.anatomy.embedding, built.anatomy.head
        shapes = {name: place.shape for name, place in built.all_places.items()}
        shapes |= {f"{head}.weight": shapes[f"{embedding}.weight"]} if built.tied_name else {}
        check_fits(given, shapes, embedding, head)
        load_adapter(given, built.parameters, built.places, {f"{embedding}.weight": f"{head}.weight"})


def check_vocabulary(built: BuiltStage, given: int, needed: int) -> None:
    """Raise UserError if the data needs more tokens than the base has and the embedding is not trained."""
    if built.adapted is None or needed <= given:
        return
    ends = {built.anatomy.embedding, built.anatomy.head}
    if not ends <= set(built.adapted.saved):
        raise UserError(
            f"the data's tokenizer has {needed - given} tokens that the base model lacks, which adapters alone cannot "
            "learn: "
            f"add --lora_modules_to_save {' '.join(sorted(ends))}, or use a --template without new tokens"
        )


def trained_text(built: BuiltStage) -> str:
    """Describe how many of all parameters are trained, over all stages."""
    assert built.adapted is not None
    adapted, shapes = built.adapted, {name: place.shape for name, place in built.all_places.items()}
    added = sum(prod(place.shape) for place in adapted.places.values())
    saved = sum(prod(shape) for name, shape in shapes.items() if name.rpartition(".")[0] in adapted.saved)
    total = sum(prod(shape) for shape in shapes.values()) + added
    return f"trained   {added + saved:,} of {total:,} parameters ({(added + saved) / total:.2%})"


def facts(built: BuiltStage, spec: RunSpec) -> dict[str, Any] | None:
    """What is needed to write the adapter of a checkpoint."""
    if built.adapted is None:
        return None
    return {
        "config": adapter_config_of(built.adapted, _base_name(spec)),
        "tied_name": built.tied_name,
        "head": built.anatomy.head,
    }


def _base_name(spec: RunSpec) -> str:
    """What PEFT loads the base from: a Hub id, or a folder."""
    path = spec.base.entry.path
    is_early = spec.settings.model.intermediate_iter is not None
    is_on_hub = not Path(path).expanduser().exists() and path.count("/") == 1 and not is_early
    return path if is_on_hub else str(spec.base.folder.resolve())
