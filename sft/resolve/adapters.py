"""What a job says of adapters: from the flags, or from an adapter that training begins with, to what is built."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.checkpoint.adapter_config import CONFIG, WEIGHTS, read_adapter_config
from sft.config.settings import Settings
from sft.resolve.base import BaseModel
from tokenize_data.errors import UserError

if TYPE_CHECKING:
    from sft.checkpoint.adapter import AdapterFiles
    from sft.model.build import BuiltStage
    from sft.model.lora import LoraSettings


def with_adapter(settings: Settings) -> Settings:
    """The configuration with rank and scale of the adapter that it begins with."""
    if settings.adapters.adapter is None:
        return settings
    given = read_adapter_config(Path(settings.adapters.adapter))
    if not given.is_uniform:
        raise UserError(
            f"{settings.adapters.adapter} has adapters of several ranks or scales: merge it (sft merge) and train new "
            "ones "
            "on the result"
        )
    for name, value in (("lora", given.rank), ("lora_alpha", given.alpha)):
        asked = settings.value(name)
        if asked not in (None, value):
            raise UserError(
                f"--{name} {asked:g} with --adapter {settings.adapters.adapter}, which has {value:g}: leave "
                f"--{name} out"
            )
    return settings.replace(lora=given.rank, lora_alpha=given.alpha, lora_rslora=given.is_rank_stabilised)


def check_base(settings: Settings, base: BaseModel) -> None:
    """An adapter of ours says what it was trained on."""
    try:
        training = json.loads((Path(settings.adapters.adapter or "") / "training.json").read_bytes())
        made_on = training["base_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if settings.adapters.adapter is not None and made_on != base.fingerprint:
        raise UserError(
            f"--adapter {settings.adapters.adapter} was trained on {training.get('base')} (fingerprint "
            f"{made_on[:12]}), "
            f"{base.folder} is another one "
            f"({base.fingerprint[:12]}): use that base, or begin without --adapter"
        )


def fingerprint(settings: Settings) -> str | None:
    """Of the adapter that training begins with."""
    if settings.adapters.adapter is None:
        return None
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        try:
            digest.update((Path(settings.adapters.adapter) / name).read_bytes())
        except OSError as error:
            raise UserError(
                f"{Path(settings.adapters.adapter) / name}: {error.strerror}: give the folder of an adapter in "
                "PEFT's format"
            ) from error
    return digest.hexdigest()


def settings_of(settings: Settings, given: AdapterFiles | None) -> LoraSettings | None:
    """None where all weights are trained."""
    from sft.model.lora import LoraSettings

    if settings.adapters.lora is None:
        return None
    targets, saved = settings.adapters.lora_targets, settings.adapters.lora_modules_to_save
    if given is not None:
        targets, saved = tuple(given.modules), tuple(dict.fromkeys(name.rpartition(".")[0] for name in given.saved))
        saved = tuple(name for name in saved if name not in targets)
    return LoraSettings(
        rank=settings.adapters.lora,
        alpha=settings.adapters.lora_alpha or 2.0 * settings.adapters.lora,
        dropout=settings.adapters.lora_dropout,
        targets=targets,
        modules_to_save=saved,
        is_rank_stabilised=settings.adapters.lora_rslora,
        seed=settings.data.seed,
    )


def begin(built: BuiltStage, given: AdapterFiles | None) -> None:
    """Give adapters the values that training begins with."""
    from sft.checkpoint.adapter import check_fits, load_adapter
    from sft.model.lora import initialise

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
    """`given` tokens in the base model, `needed` ones in the data: new ones are learnt in the embedding, which has to
    be trained.
    """
    if built.adapted is None or needed <= given:
        return
    ends = {built.anatomy.embedding, built.anatomy.head}
    if not ends <= set(built.adapted.saved):
        raise UserError(
            f"the data's tokenizer has {needed - given} tokens that the base model lacks, which adapters alone cannot "
            "learn: "
            f"add --lora_modules_to_save {' '.join(sorted(ends))}, or use a --template without new tokens"
        )


def description(settings: Settings) -> str | None:
    """For the header."""
    if settings.adapters.lora is None:
        return None
    targets = (
        "all linear layers"
        if settings.adapters.lora_targets == ("all-linear",)
        else ", ".join(settings.adapters.lora_targets)
    )
    if settings.adapters.adapter is not None:
        targets = f"those of {settings.adapters.adapter}"
    bits = bits_of(settings)
    saved = (
        f"; in full: {', '.join(settings.adapters.lora_modules_to_save)}"
        if settings.adapters.lora_modules_to_save
        else ""
    )
    return f"rank {settings.adapters.lora} on {targets}{saved}" + (f"; base in {bits} bits" if bits else "")


def trained_text(built: BuiltStage) -> str:
    """How much is trained, of how much, in all stages."""
    from math import prod

    assert built.adapted is not None
    adapted, shapes = built.adapted, {name: place.shape for name, place in built.all_places.items()}
    added = sum(prod(place.shape) for place in adapted.places.values())
    saved = sum(prod(shape) for name, shape in shapes.items() if name.rpartition(".")[0] in adapted.saved)
    total = sum(prod(shape) for shape in shapes.values()) + added
    return f"trained   {added + saved:,} of {total:,} parameters ({(added + saved) / total:.2%})"


def bits_of(settings: Settings) -> int | None:
    return 4 if settings.adapters.load_in_4bit else 8 if settings.adapters.weight_only_8bit else None


def base_name(settings: Settings, base: BaseModel) -> str:
    """What PEFT loads the base from: a Hub id, or a folder."""
    is_on_hub = (
        not Path(base.entry.path).expanduser().exists()
        and base.entry.path.count("/") == 1
        and settings.model.intermediate_iter is None
    )
    return base.entry.path if is_on_hub else str(base.folder.resolve())


def facts(built: BuiltStage, settings: Settings, base: BaseModel) -> dict[str, Any] | None:
    """What is needed to write the adapter of a checkpoint."""
    from sft.checkpoint.adapter import adapter_config_of

    if built.adapted is None:
        return None
    return {
        "config": adapter_config_of(built.adapted, base_name(settings, base)),
        "tied_name": built.tied_name,
        "head": built.anatomy.head,
    }
