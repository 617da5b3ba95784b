"""The layout of a model and its data over processes, checked before any process starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sft.families.table import family_of
from tokenize_data.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The world is tp * pp * dp processes. A process number counts tensor ranks first, then stages, then data ranks."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        return f"tp {self.tp} x pp {self.pp} x dp {self.dp}"


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The parts of config.json that decide how a model can be split. None: not in the file."""

    kind: str
    layers: int | None = None
    heads: int | None = None
    key_value_heads: int | None = None
    intermediate: int | None = None

    @classmethod
    def of_config(cls, config: dict[str, Any]) -> ModelShape:
        """Read config.json under the names that families use."""

        def first(*names: str) -> int | None:
            return next((int(config[name]) for name in names if isinstance(config.get(name), int)), None)

        heads = first("num_attention_heads", "n_head", "n_heads")
        kind = str(config.get("model_type", "unknown"))
        key_value_heads = first("num_key_value_heads", "num_kv_heads", "n_head_kv") or heads
        return cls(
            kind=kind,
            layers=first("num_hidden_layers", "n_layer", "n_layers"),
            heads=heads,
            key_value_heads=key_value_heads,
            intermediate=first("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"),
        )


def choose_layout(
    world: int, shape: ModelShape, *, tp: int | None, pp: int | None, sequence_parallel: bool | None, global_batch: int
) -> Layout:
    """The layout of `world` processes: sizes that are not given are 1, and the rest is data-parallel."""
    tp, pp = tp or 1, pp or 1
    if world % (tp * pp):
        fitting = ", ".join(f"{count}" for count in range(1, world + 1) if world % count == 0)
        needed = f"tp {tp} x pp {pp} needs a multiple of {tp * pp} processes, but {world} would start"
        raise UserError(f"{needed}: start {tp * pp} or more (--nproc_per_node, --nodes), or use a tp * pp of {fitting}")
    dp = world // (tp * pp)
    if global_batch % dp:
        fitting = ", ".join(str(count) for count in range(1, min(global_batch, 1024) + 1) if global_batch % count == 0)
        raise UserError(
            f"global_batch {global_batch} is not divisible by dp {dp}: use dp {fitting}, or a global_batch of "
            f"{dp}, {2 * dp}, ..."
        )
    _check_stages(pp, shape)
    _check_tensors(tp, shape)
    return Layout(tp=tp, pp=pp, dp=dp, sequence_parallel=tp > 1 and sequence_parallel is not False)


def _check_stages(pp: int, shape: ModelShape) -> None:
    if shape.layers is not None and pp > shape.layers:
        raise UserError(
            f"--pp {pp} is more stages than the {shape.layers} layers of this {shape.kind} model: use --pp 1 to "
            f"{shape.layers}"
        )


def _check_tensors(tp: int, shape: ModelShape) -> None:
    heads, groups = shape.heads, shape.key_value_heads
    if tp == 1 or heads is None or groups is None:
        return
    may_share = family_of(shape.kind).shares_key_value_heads
    fitting = [
        n for n in range(1, heads + 1) if _fits(n, heads, groups, may_share) and (shape.intermediate or 0) % n == 0
    ]
    if tp not in fitting:
        inner = (
            f", {groups} key-value heads and {shape.intermediate} inner features"
            if shape.intermediate
            else f" and {groups} key-value heads"
        )
        options = ", ".join(map(str, fitting))
        raise UserError(f"--tp {tp} does not divide this {shape.kind} model's {heads} heads{inner}: use --tp {options}")


def _fits(tp: int, heads: int, groups: int, may_share: bool) -> bool:
    """Whether key-value heads can be split over ranks, or shared between them."""
    return heads % tp == 0 and (groups % tp == 0 or (may_share and tp % groups == 0))
