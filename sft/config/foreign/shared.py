"""Keys shared by several trainers, mostly those of transformers' TrainingArguments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft.config.foreign import schedules
from sft.config.foreign.rules import (
    Line,
    Rule,
    mapped,
    no_effect,
    of_words,
    off,
    only,
    part_of,
    refused,
    to,
    warned,
    whole,
)
from sft.config.settings import default_of

_OPTIMIZERS = {
    **dict.fromkeys(
        (
            "adamw_torch",
            "adamw_torch_fused",
            "adamw_hf",
            "adamw_apex_fused",
            "adamw",
            "paged_adamw",
            "paged_adamw_32bit",
        ),
        "adamw",
    ),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), "adamw8bit"),
    "adafactor": "adafactor",
    "sgd": "sgd",
}
_TRACKERS = ("tensorboard", "wandb", "trackio")
_BLOCKS = "the layers are transformers' own, split as tp and pp say"
_ALL_LOGGED = "every iteration is logged"


def run_name_of(text: str) -> str:
    """Turn a text into a valid run name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-") or "run"


def warmup_steps(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    if isinstance(value, float) and 0 < value < 1:
        return mapped(key, value, {"warmup_fraction": value}, "a share of the iterations")
    if not value:
        return mapped(key, value, {}, "see warmup_ratio" if recipe.get("warmup_ratio") else "no warm-up by number")
    return mapped(key, value, {"warmup_iters": whole(key, value)})


def max_steps(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    return (
        mapped(key, value, {"iters": value})
        if isinstance(value, int) and value > 0
        else mapped(key, value, {}, "no limit: see num_train_epochs")
    )


def half(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    return (
        mapped(key, value, {"dtype": "bf16"})
        if value
        else mapped(key, value, {}, "see dtype: bf16 on GPUs unless it says otherwise")
    )


def checkpointing(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    return mapped(
        key, value, {"recompute": "full" if value else "none"}, "full computes each layer again for the backward pass"
    )


def report_to(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    names = [str(name).lower() for name in (value if isinstance(value, list) else [value])]
    if names == ["all"]:
        return warned(key, value, "TensorBoard only: ask for others with wandb, trackio", {"tensorboard": True})
    if unknown := [name for name in names if name not in (*_TRACKERS, "none", "no", "false")]:
        return refused(key, value, f"there is no {unknown[0]}: use {', '.join(_TRACKERS)} or none")
    return mapped(key, value, {name: name in names for name in _TRACKERS})


def save_limit(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    return mapped(key, value, {"keep": max(1, whole(key, value))}, "the best one as well, with early_stopping")


def save_strategy(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    if value == "steps":
        return mapped(key, value, {}, "see save_steps")
    if value == "epoch":
        return mapped(key, value, {"save_each_epoch": True})
    return warned(
        key,
        value,
        "checkpoints are written every save_interval iterations, at the end, and on a signal; see save_steps",
    )


def save_steps(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    if recipe.get("save_strategy") == "epoch":
        return mapped(key, value, {}, "see save_strategy")
    if isinstance(value, float) and value < 1:
        return refused(key, value, "a share of the run: write save_interval, a number of iterations")
    if recipe.get("save_strategy", "steps") != "steps":
        return warned(key, value, "applies here with any save_strategy", {"save_interval": whole(key, value)})
    return mapped(key, value, {"save_interval": whole(key, value)})


def hub_id(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    if not recipe.get("push_to_hub"):
        return warned(key, value, "no effect without push_to_hub")
    return mapped(key, value, {}, "see push_to_hub")


def push(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    if not value:
        return mapped(key, value, {}, "nothing is uploaded unless push_to_hub names a repository")
    name = recipe.get("hub_model_id") or Path(str(recipe.get("output_dir") or "model")).name
    return mapped(key, value, {"push_to_hub": str(name)}, "after training; private unless hub_public")


def hub_private(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    return mapped(key, value, {} if value else {"hub_public": True}, "private unless hub_public")


def token(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    if isinstance(value, str) and value.lower() not in ("true", "false"):
        return refused(
            key, "...", "a secret does not belong in a recipe: `hf auth login`, or HF_TOKEN in the environment"
        )
    return mapped(key, value, {}, "the token of `hf auth login`, or HF_TOKEN, is used where there is one")


def output_dir(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    return mapped(key, value, {"save_checkpoint_dir": str(value)}, "the run's folder is made in it")


def quantised(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    return mapped(key, value, {key: bool(value)})


def eight_bits(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    if not value:
        return mapped(key, value, {})
    return warned(
        key,
        value,
        "only weights are in 8 bits here: activations are not rounded as in LLM.int8()",
        {"weight_only_8bit": True},
    )


def trust(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    if not value:
        return mapped(key, value, {})
    return mapped(key, value, {"trust_remote_code": True}, "the base must be a folder, so that its code cannot change")


def run_name(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    return mapped(key, value, {"run_name": run_name_of(str(value))}, "names the data set and the run's folder")


RULES: dict[str, Rule] = {
    "learning_rate": to("lr"),
    "num_train_epochs": to("epochs"),
    "max_steps": max_steps,
    "gradient_accumulation_steps": to(
        "gradient_accumulation", "times micro_batch, times the number of replicas: documents an iteration"
    ),
    "lr_scheduler_type": schedules.kind_of,
    "lr_scheduler_kwargs": schedules.extras,
    "warmup_ratio": to("warmup_fraction"),
    "warmup_steps": warmup_steps,
    "weight_decay": to("weight_decay"),
    "adam_beta1": to("beta1"),
    "adam_beta2": to("beta2"),
    "adam_epsilon": to("eps"),
    "max_grad_norm": to("clip"),
    "optim": of_words("optimizer", _OPTIMIZERS, "there is no such optimizer"),
    "optim_args": off("set the optimizer's own flags"),
    "seed": to("seed"),
    "bf16": half,
    "fp16": off("fp16 is not supported: use bf16: true, or dtype: fp32"),
    "gradient_checkpointing": checkpointing,
    "gradient_checkpointing_kwargs": no_effect("recomputation is never reentrant"),
    "load_in_4bit": quantised,
    "load_in_8bit": eight_bits,
    "trust_remote_code": trust,
    "run_name": run_name,
    "output_dir": output_dir,
    "logging_steps": no_effect(_ALL_LOGGED),
    "logging_strategy": no_effect(_ALL_LOGGED),
    "logging_first_step": no_effect(_ALL_LOGGED),
    "logging_dir": no_effect("TensorBoard files are in the run's folder"),
    "report_to": report_to,
    "log_with": report_to,
    "save_strategy": save_strategy,
    "save_steps": save_steps,
    "save_total_limit": save_limit,
    "push_to_hub": push,
    "hub_model_id": hub_id,
    "hub_private_repo": hub_private,
    "hub_token": token,
    "use_auth_token": token,
    "token": token,
    "packing": no_effect("documents are always packed, and never attend to each other"),
    "dataset_text_field": part_of("dataset_name"),
    "dataset_num_proc": no_effect("the data stage uses every core"),
    "neftune_noise_alpha": off("noise on embeddings is not added here: take it out"),
}


def defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of transformers' Trainer that differ from ours."""
    found: dict[str, Any] = {
        "weight_decay": 0.0,
        "beta2": 0.999,
        "eps": 1e-8,
        "seed": 42,
        "schedule": "linear",
        "min_lr": 0.0,
        "warmup_fraction": 0.0,
        "save_interval": 500,
    }
    lr = recipe.get("learning_rate")
    if isinstance(lr, float | int) and default_of("min_lr") > lr:
        found["min_lr"] = 0.0
    return found


__all__ = ["RULES", "defaults", "only", "run_name_of"]
