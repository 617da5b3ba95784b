"""Translates learning-rate schedules: lr_scheduler_type with lr_scheduler_kwargs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft.config.foreign.rules import Line, mapped, mapping, number, refused, whole

_SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"schedule": "linear", "min_lr": 0.0},
    "cosine": {"schedule": "cosine", "min_lr": 0.0},
    "constant": {"schedule": "constant", "warmup_fraction": 0.0},
    "constant_with_warmup": {"schedule": "constant"},
    "inverse_sqrt": {"schedule": "inverse_sqrt", "min_lr": 0.0},
}
_EXTRAS = {  # known lr_scheduler_kwargs
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "polynomial": ("lr_end", "power"),
    "cosine_with_restarts": ("num_cycles",),
    "warmup_stable_decay": ("num_decay_steps", "min_lr_ratio", "decay_type", "warmup_type"),
}


def kind_of(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    kind, extra = str(value).lower(), mapping("lr_scheduler_kwargs", recipe.get("lr_scheduler_kwargs"))
    if odd := [name for name in extra if name not in _EXTRAS.get(kind, ())]:
        return refused(key, value, f"{odd[0]} of lr_scheduler_kwargs: this schedule has no such setting")
    if kind == "cosine_with_min_lr":
        return mapped(key, value, {"schedule": "cosine", "min_lr": _lowest("min_lr_rate", extra, recipe)})
    if kind == "polynomial":
        power = number("power", extra.get("power", 1.0))
        lowest = number("lr_end", extra.get("lr_end", 1e-7))
        return mapped(key, value, {"schedule": kind, "min_lr": lowest, "schedule_power": power})
    if kind == "cosine_with_restarts":
        cycles = whole("num_cycles", extra.get("num_cycles", 1))
        return mapped(key, value, {"schedule": kind, "min_lr": 0.0, "schedule_cycles": cycles})
    if kind == "warmup_stable_decay":
        return _stable(key, value, extra, recipe)
    known = ", ".join(sorted({"cosine", "linear", "constant", "inverse_sqrt", *_EXTRAS}))
    return (
        mapped(key, value, _SCHEDULES[kind])
        if kind in _SCHEDULES
        else refused(key, value, f"there is no such schedule: use one of {known}")
    )


def _stable(key: str, value: Any, extra: Mapping[str, Any], recipe: Mapping[str, Any]) -> Line:
    if extra.get("decay_type", "cosine") != "cosine" or extra.get("warmup_type", "linear") != "linear":
        return refused(key, value, "here it rises linearly and falls as a cosine: leave decay_type and warmup_type out")
    steps, total = extra.get("num_decay_steps"), recipe.get("max_steps")
    ours: dict[str, Any] = {"schedule": "wsd", "min_lr": _lowest("min_lr_ratio", extra, recipe)}
    if steps is None:
        return mapped(key, value, ours, "falls over decay_fraction of the iterations, the last ones")
    if not isinstance(total, int) or total <= 0:
        return refused(key, value, "num_decay_steps needs max_steps: write schedule: wsd and decay_fraction")
    share = max(number("num_decay_steps", steps) - 0.5, 0.25) / total  # rounding up gives the same number again
    return mapped(key, value, ours | {"decay_fraction": min(1.0, share)})


def _lowest(share: str, extra: Mapping[str, Any], recipe: Mapping[str, Any]) -> float:
    top = number("learning_rate", recipe.get("learning_rate") or 2e-5)
    return number("min_lr", extra.get("min_lr", top * number(share, extra.get(share, 0.0))))


def extras(key: str, value: Any, recipe: Mapping[str, Any]) -> Line:
    if value and recipe.get("lr_scheduler_type") is None:
        return refused(key, value, "lr_scheduler_type says which schedule they belong to: give it")
    return mapped(key, value, {}, "see lr_scheduler_type")
