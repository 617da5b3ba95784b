"""Settings and checks for training that starts from an existing adapter."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from sft.checkpoint.adapter_config import CONFIG, WEIGHTS, read_adapter_config
from sft.config.settings import Settings
from sft.spec.base import BaseModel
from tokenize_data.errors import UserError


def with_adapter(settings: Settings) -> Settings:
    """Take rank and scale from the adapter that training starts from."""
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
    """Raise UserError if the adapter records that it was trained on another base model."""
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
    """Hash the adapter that training starts from; None without one."""
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


def description(settings: Settings) -> str | None:
    """Describe the adapters in one line, for the header."""
    if settings.adapters.lora is None:
        return None
    targets = (
        "all linear layers"
        if settings.adapters.lora_targets == ("all-linear",)
        else ", ".join(settings.adapters.lora_targets)
    )
    if settings.adapters.adapter is not None:
        targets = f"those of {settings.adapters.adapter}"
    quantisation = settings.adapters.quantisation
    saved = (
        f"; in full: {', '.join(settings.adapters.lora_modules_to_save)}"
        if settings.adapters.lora_modules_to_save
        else ""
    )
    return f"rank {settings.adapters.lora} on {targets}{saved}" + (
        f"; base in {quantisation.bits} bits" if quantisation else ""
    )
