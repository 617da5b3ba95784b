"""The flat config.yml of notebook-style trainers: model_name, dataset_name, batch_size, seq_length, peft_lora_r, and so
on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft.config.foreign import data, shared, trl
from sft.config.foreign.rules import Line, Rule, Trainer, mapped, number, part_of, to, warned


def _peft(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    if not value:
        return mapped(key, value, {}, "all weights are trained")
    ours = {
        "lora": recipe.get("peft_lora_r") or 64,
        "lora_alpha": number("peft_lora_alpha", recipe.get("peft_lora_alpha") or 16),
    }
    return warned(
        key, value, "adapters are on all linear layers here, where peft chooses by family: see lora_targets", ours
    )


def _rank(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    if not recipe.get("use_peft"):
        return warned(key, value, "no effect without use_peft")
    return mapped(key, value, {}, "see use_peft")


RULES: dict[str, Rule] = {
    **trl.RULES,
    "model_name": to("checkpoint"),
    "dataset_text_field": part_of("dataset_name"),
    "dataset_name": data.named,
    "batch_size": to("micro_batch", "number of documents of seq tokens that fit"),
    "seq_length": to("seq"),
    "use_peft": _peft,
    "peft_lora_r": _rank,
    "peft_lora_alpha": _rank,
}


def _defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **shared.defaults(recipe),
        "lr": 1.41e-5,
        "micro_batch": 64,
        "gradient_accumulation": 16,
        "seq": 512,
        "save_interval": 100,
        "keep": 10,
        "loss": "full",
    }


TRAINER = Trainer(
    name="the flat config.yml",
    rules=RULES,
    defaults=_defaults,
    marks=frozenset({"model_name", "batch_size", "seq_length", "peft_lora_r", "peft_lora_alpha", "use_auth_token"}),
)
