"""Number of weights on a rank of a stage: all, quantised and trained ones."""

from __future__ import annotations

from dataclasses import dataclass

from sft.config.quantisation import Quantisation
from sft.families.architecture import Architecture, Linear
from sft.plan.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """LoRA adapters. `targets` are names of linear layers, or all-linear."""

    rank: int
    targets: tuple[str, ...] = ("all-linear",)
    quantisation: Quantisation | None = None  # format of the frozen linear layers


@dataclass(frozen=True, kw_only=True)
class StageWeights:
    """Numbers of weights on a rank of one stage."""

    base: int  # of the model's weights
    quantised: int  # of those, quantised
    trained: int  # with gradients and moments
    largest: int  # the largest trained tensor
    ends: int  # of embedding and head, if trained


def stage_weights(
    model: Architecture, layout: Layout, stage: int, layers: range, adapters: Adapters | None
) -> StageWeights:
    tp, is_first, is_last = layout.tp, stage == 0, stage == layout.pp - 1
    table = vocabulary_weights(model, layout)
    base = len(layers) * model.layer_weights_on(tp)
    base += table + model.embedding_weights - model.head_weights if is_first else 0
    base += model.final_weights if is_last else 0
    own_head = is_last and not (model.is_tied and is_first)
    base += table if own_head else 0
    base += model.vocabulary_on(tp) if is_last and model.head_has_bias else 0
    linears = [
        inputs * outputs for inputs, outputs in (linear.shape_on(tp, model.head_size) for linear in model.linears)
    ]
    ends = table * (is_first + own_head)
    if adapters is None:
        return StageWeights(
            base=base, quantised=0, trained=base, largest=max([*linears, *([table] if ends else [])]), ends=ends
        )
    quantised = len(layers) * sum(linears) if adapters.quantisation else 0
    of_layer = [
        adapters.rank * max(linear.shape_on(tp, model.head_size)) for linear in adapted_linears(model, adapters)
    ]
    trained = len(layers) * lora_weights(model, tp, adapters)
    return StageWeights(
        base=base + trained, quantised=quantised, trained=trained, largest=max(of_layer, default=0), ends=0
    )


def vocabulary_weights(model: Architecture, layout: Layout) -> int:
    """Weights of an embedding or head on a tensor rank."""
    return model.vocabulary_on(layout.tp) * (model.embedding_size or model.hidden)


def lora_weights(model: Architecture, tp: int, adapters: Adapters) -> int:
    """Weights of a layer's adapters on a tensor rank: A (rank x inputs) and B (outputs x rank), split like the
    layer.
    """
    return sum(adapters.rank * sum(linear.shape_on(tp, model.head_size)) for linear in adapted_linears(model, adapters))


def adapted_linears(model: Architecture, adapters: Adapters) -> list[Linear]:
    return [
        linear for linear in model.linears if adapters.targets == ("all-linear",) or linear.name in adapters.targets
    ]
