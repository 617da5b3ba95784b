"""The parity table in bfloat16: which combinations of what a user can choose are compared with a bare loop over
transformers or PEFT.
"""

from __future__ import annotations

from typing import Any

from tests.distributed.covering import Row, covering, often_enough
from tests.models import FAMILIES

LAYOUTS: dict[str, dict[str, int]] = {
    "one": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "dp2": {"dp": 2},
    "tp2 x pp2": {"tp": 2, "pp": 2},
    "tp2 x dp2": {"tp": 2, "dp": 2},
}
MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "adapters": {"lora": {}},
    "adapters, saved": {"lora": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}},
    "4 bits": {"lora": {}, "bits": 4},
    "8 bits": {"lora": {}, "bits": 8},
}
AXES: dict[str, list[Any]] = {
    "family": sorted(FAMILIES),
    "layout": list(LAYOUTS),
    "mode": list(MODES),
    "tied": [False, True],
    "recompute": ["none", "selective", "full"],
    "optimizer": ["adamw", "adamw8bit", "adafactor", "muon", "sgd", "sgd, momentum"],
    "sequence_parallel": [False, True],
    "loss_mask": [0.0, 0.5],
    "pack": [True, False],
    "split": [False, True],  # are tensors over replicas, by rows; large ones are
}
# What the modules of "adapters, saved" are called where they are not called as in Llama.
_EMBEDDING = {"gpt-j": "wte", "gpt-neox": "embed_in", "falcon": "word_embeddings", "falcon-new": "word_embeddings"}
_HEAD: dict[str, str] = {}
_NORM = {
    "gpt-j": "ln_f",
    "gpt-neox": "final_layer_norm",
    "opt": "decoder.final_layer_norm",
    "opt-350m": "self_attn_layer_norm",
    "falcon": "ln_f",
    "falcon-new": "ln_f",
}


def is_allowed(row: Row) -> bool:
    """Left out: stretches of tokens on one tensor rank, and split tensors on one replica, where neither has an
    effect; GPT-J's head trained in full beside adapters where it is tied, which is refused (PEFT loses its bias).
    """
    layout = row.get("layout")
    return (
        not (row.get("sequence_parallel") and layout not in (None, "tp2", "tp2 x pp2", "tp2 x dp2"))
        and not (row.get("split") and layout not in (None, "dp2", "tp2 x dp2"))
        and not (row.get("family") == "gpt-j" and row.get("tied") and row.get("mode") == "adapters, saved")
        and not (row.get("split") and row.get("sequence_parallel") and layout not in (None, "tp2 x dp2"))
    )


def case_of(row: Row) -> dict[str, Any]:
    """What a worker is told."""
    family, mode = row["family"], MODES[row["mode"]]
    case = {
        "kind": "parity",
        "dtype": "bfloat16",
        "layers": 2,
        "iterations": 3,
        "family": family,
        "tied": row["tied"],
        "recompute": row["recompute"],
        "optimizer": row["optimizer"],
        "sequence_parallel": row["sequence_parallel"],
        "loss_mask": row["loss_mask"],
        "pack": row["pack"],
        "small": 512 if row["split"] else 2**16,
        **LAYOUTS[row["layout"]],
        **mode,
    }
    if "modules_to_save" in mode.get("lora", {}):
        saved = [_EMBEDDING.get(family, "embed_tokens"), _HEAD.get(family, "lm_head"), _NORM.get(family, "model.norm")]
        case["lora"] = {"modules_to_save": saved}
    return case


def name_of(row: Row) -> str:
    tied = "tied" if row["tied"] else "untied"
    words = [row["family"], row["layout"], row["mode"], tied, row["optimizer"], f"recompute {row['recompute']}"]
    words += (
        ["stretches"] * row["sequence_parallel"]
        + [f"mask {row['loss_mask']}"]
        + ["unpacked"] * (not row["pack"])
        + ["split"] * row["split"]
    )
    return ", ".join(words)


_ADDED = "gpt-j"  # in rows of its own, so that the others stay as they were when it came
_OTHERS = covering({**AXES, "family": [name for name in AXES["family"] if name != _ADDED]}, is_allowed)
_OWN = covering({**AXES, "family": [_ADDED]}, lambda row: is_allowed({**row, "family": _ADDED}))
ROWS = [*_OTHERS, *_OWN]
IN_CI = [*often_enough(_OTHERS, 2), *_OWN[:2]]
