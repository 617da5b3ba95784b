"""GPT-J: its own attention, with rotary positions from a table; attention and MLP side by side; a head with a bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft.families.architecture import Architecture, Linear
from sft.families.counting import plain
from sft.families.family import SMALL, Family
from sft.families.sizes import sizes_of, whole
from sft.families.table import register

_PLAN = {
    "attn.q_proj": "colwise",
    "attn.k_proj": "colwise",
    "attn.v_proj": "colwise",
    "attn.out_proj": "rowwise",
    "mlp.fc_in": "colwise",
    "mlp.fc_out": "rowwise",
}
_SMALL = {
    **{name: value for name, value in SMALL.items() if name != "intermediate_size"},
    "n_inner": SMALL["intermediate_size"],
    "rotary_dim": 8,
}


def _count(config: Mapping[str, Any]) -> Architecture:
    hidden = sizes_of(config)["hidden"]
    inner = whole(config, "n_inner", 4 * hidden)
    names = (("q_proj", "columns"), ("k_proj", "columns"), ("v_proj", "columns"), ("out_proj", "rows"))
    linears = (
        *(Linear(name=name, inputs=hidden, outputs=hidden, split=split) for name, split in names),
        Linear(name="fc_in", inputs=hidden, outputs=inner, split="columns", has_bias=True),
        Linear(name="fc_out", inputs=inner, outputs=hidden, split="rows", has_bias=True),
    )
    return plain(
        config,
        linears,
        inner=inner,
        num_norms=1,
        head_has_bias=True,
        widens_scores=True,
        kept_inner=_kept_inner(config),
    )


def _kept_inner(config: Mapping[str, Any]) -> int | None:
    """This form of GELU is written out: x, 0.5 x, tanh(...), 1 + tanh(...), and the product are kept."""
    return 5 if config.get("activation_function", "gelu_new") == "gelu_new" else None


def _small_sizes(config: Any, hidden: int) -> Mapping[str, int]:
    return {"n_embd": hidden, "n_inner": 2 * hidden, "n_positions": 64, "rotary_dim": 4}


register(
    Family(
        kind="gptj",
        count=_count,
        tensor_plan=lambda config: _PLAN,
        takes_row_mask=True,
        has_position_limit=True,
        ignored_tensors=(r"\.attn\.(masked_)?bias$",),  # masks that older versions of transformers saved
        small_sizes=_small_sizes,
        variants={"gpt-j": _SMALL},
    )
)
