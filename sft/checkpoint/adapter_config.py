"""Reads and writes PEFT's adapter_config.json, without torch. Unsupported variants are rejected by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenize_data.errors import UserError, shorten

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # prefix of each parameter's name in the weights
# Variants whose adapters add something other than scale * B A.
_VARIANTS = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "alora_invocation_tokens",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "megatron_config",
)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """How an adapter's matrices are used."""

    folder: Path
    rank: int
    alpha: float
    is_rank_stabilised: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base: str | None  # the base model's name when the adapter was made

    @property
    def is_uniform(self) -> bool:
        return not self.rank_pattern and not self.alpha_pattern

    def scale(self, module: str, rank: int) -> float:
        """The scale of a module's adapter with this rank."""
        alpha = next(
            (value for key, value in self.alpha_pattern.items() if re.fullmatch(rf"(.*\.)?({key})", module)), self.alpha
        )
        return float(alpha) / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def read_adapter_config(folder: Path) -> AdapterConfig:
    path = folder / CONFIG
    try:
        content = json.loads(path.read_bytes())
        kind = str(content["peft_type"]).upper()
        if kind != "LORA":
            raise UserError(f"{path} describes an adapter of kind {kind}: only LORA is supported")
        used = [name for name in _VARIANTS if content.get(name)]
        used += ["bias"] if content.get("bias", "none") != "none" else []
        if used:
            listing = ", ".join(f"{name} = {shorten(content[name], 40)}" for name in used)
            raise UserError(
                f"{path} describes an adapter with {listing}, which is not supported: merge it with PEFT's "
                "merge_and_unload"
            )
        return AdapterConfig(
            folder=folder,
            rank=int(content["r"]),
            alpha=float(content["lora_alpha"]),
            is_rank_stabilised=bool(content.get("use_rslora")),
            rank_pattern=dict(content.get("rank_pattern") or {}),
            alpha_pattern=dict(content.get("alpha_pattern") or {}),
            base=content.get("base_model_name_or_path"),
        )
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: give the folder of an adapter in PEFT's format") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as PEFT's ({type(error).__name__}: {shorten(error, 80)}): fetch the adapter again"
        ) from error


def config_content(
    *,
    rank: int,
    alpha: float,
    dropout: float,
    is_rank_stabilised: bool,
    base: str,
    modules: Sequence[str],
    all_linear: Sequence[str],
    saved: Sequence[str],
) -> dict[str, Any]:
    """The config that PEFT needs to load the adapter. `modules` have one, `all_linear` are all linear layers."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "use_rslora": is_rank_stabilised,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": _short(modules, all_linear),
        "modules_to_save": sorted(saved) or None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _short(modules: Sequence[str], everything: Sequence[str]) -> list[str]:
    """Shorten module names to their last component if that is unambiguous: PEFT compares the ends of names."""
    words = sorted({name.rpartition(".")[2] for name in modules})
    meant = {name for name in everything if name.rpartition(".")[2] in words}
    return words if meant == set(modules) else list(modules)
