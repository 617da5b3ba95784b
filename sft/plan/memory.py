"""How many bytes a rank needs at most while it trains, by kind: a model of this engine, checked against its measured peaks.

T tokens in a row, w bytes of a number (2 in bf16, 4 in float32), t tensor ranks, W weights of a rank. What is counted:

- at rest: weights wW, and of the trained ones the float32 master and the optimizer's moments, spread over replicas (ZeRO-1), and the
  float32 sum of gradients; in bf16 the last micro-batch's own gradients stay as well;
- activations: what each layer keeps for its backward pass, for every micro-batch that a stage has in flight (1F1B: stages that follow, plus
  one), and what the backward pass of one layer holds for a moment;
- logits: of trained tokens alone, in float32, with their gradients;
- buffers: gradients flattened and sent to the other replicas.

The peak is the greatest of the moments at which these meet: the loss, a layer's backward pass, the exchange of gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sft.plan.activations import Activations, activations_of
from sft.plan.architecture import Architecture, Linear
from sft.plan.layout import Layout

_FLAT_ELEMENTS = 500_000_000  # DeepSpeed copies groups of gradients up to this size into one buffer
_MOMENTS = {"adamw": 8.0, "adamw8bit": 2.0, "adafactor": 4.0, "sgd": 0.0}  # bytes for each trained weight
_QUANTISED = {4: 0.5 + 4 / 64, 8: 1.0 + 4 / 4096}  # bytes for each weight, with the scales of blocks


def bucket_elements(replicas: int) -> int:
    """Gradients that go to other replicas at once. In float32 the engine holds two buffers of as many, however small a model is."""
    return 50_000_000 if replicas > 1 else 5_000_000


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """LoRA. `targets` are names of linear layers, or all-linear."""

    rank: int
    targets: tuple[str, ...] = ("all-linear",)
    bits: int | None = None  # of the frozen linear layers: 4, 8, or as they are


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is asked of each rank, besides the layout: numbers that memory and time depend on."""

    row_tokens: int  # room of a row: micro_batch * seq
    trained_share: float  # of the tokens
    micro_batches: int
    recompute: str
    dtype: str = "bf16"
    optimizer: str = "adamw"
    adapters: Adapters | None = None
    document_tokens: float | None = None  # mean length; attention looks no further. None: as long as a row
    longest_document: int | None = None  # None: as long as a row
    logits_chunk_tokens: int | None = None  # the loss is computed for so many tokens at once

    @property
    def bytes_each(self) -> int:
        return 2 if self.dtype == "bf16" else 4

    @property
    def trained_tokens(self) -> float:
        return self.row_tokens * self.trained_share


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes of a rank of one stage at its peak."""

    stage: int
    moment: str  # loss, layer, exchange
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.buffers


@dataclass(frozen=True, kw_only=True)
class StageWeights:
    """Numbers of weights on a rank of one stage."""

    base: int  # of the model
    quantised: int  # of those, in 4 or 8 bits
    trained: int  # with gradients and moments
    largest: int  # of one tensor that is trained


def stage_weights(model: Architecture, layout: Layout, stage: int, layers: range, adapters: Adapters | None) -> StageWeights:
    tp, is_first, is_last = layout.tp, stage == 0, stage == layout.pp - 1
    table = model.vocabulary_on(tp) * (model.embedding_size or model.hidden)
    base = len(layers) * model.layer_weights_on(tp)
    base += table + model.embedding_weights - model.head_weights if is_first else 0
    base += model.final_weights if is_last else 0
    own_head = is_last and not (model.is_tied and is_first)
    base += table if own_head else 0
    linears = [linear.shape_on(tp, model.head_size) for linear in model.linears]
    largest = max([inputs * outputs for inputs, outputs in linears] + ([table] if is_first or is_last else []))
    if adapters is None:
        return StageWeights(base=base, quantised=0, trained=base, largest=largest)
    quantised = len(layers) * sum(inputs * outputs for inputs, outputs in linears) if adapters.bits else 0
    trained = len(layers) * lora_weights(model, tp, adapters)
    return StageWeights(base=base + trained, quantised=quantised, trained=trained, largest=largest if adapters.bits else 0)


def lora_weights(model: Architecture, tp: int, adapters: Adapters) -> int:
    """Of a layer's adapters on a tensor rank: A (rank x inputs) and B (outputs x rank), of which the split side is shared out."""
    return sum(adapters.rank * sum(linear.shape_on(tp, model.head_size)) for linear in _adapted(model, adapters))


def _adapted(model: Architecture, adapters: Adapters) -> list[Linear]:
    return [linear for linear in model.linears if adapters.targets == ("all-linear",) or linear.name in adapters.targets]


def kept_of(model: Architecture, layout: Layout, work: Work) -> Activations:
    ranks = work.adapters.rank * len(_adapted(model, work.adapters)) if work.adapters else None
    return activations_of(model, layout, work.row_tokens, work.bytes_each, longest=work.longest_document, ranks=ranks)


def stage_memory(model: Architecture, layout: Layout, stage: int, layers: range, work: Work) -> StageMemory:
    """Of a rank of `stage`, which has `layers`."""
    weights = stage_weights(model, layout, stage, layers, work.adapters)
    is_first, is_last = stage == 0, stage == layout.pp - 1
    kept = kept_of(model, layout, work)
    rest = _at_rest(weights, layout, work)
    each = work.bytes_each
    in_flight = min(layout.pp - stage, work.micro_batches)
    held = in_flight * (len(layers) * kept.kept(work.recompute) + kept.boundary * (2 if not is_first else 1))
    stale = kept.boundary * _stale_boundaries(layout, is_last)  # what the engine has not let go of yet
    held += max(0.0, stale - 3 * kept.boundary)
    lives_on = weights.trained * 2 if work.dtype == "bf16" else 0  # gradients of the last micro-batch
    before = lives_on if work.micro_batches > 1 else 0
    busy = replace(rest, buffers=4.0 * bucket_elements(layout.dp)) if work.dtype == "fp32" else rest  # gradients are gathered as they come
    moments = [_layer_moment(busy, held, before, kept, model, work)]
    if is_last:
        moments.append(_loss_moment(busy, held, before, model, layout, work, each))
    moments.append(replace(_exchange_moment(rest, lives_on, weights, layout, work), activations=stale))
    peak = max(moments, key=lambda moment: moment.total)
    return replace(peak, stage=stage)


def _stale_boundaries(layout: Layout, is_last: bool) -> int:
    """DeepSpeed's pipeline keeps inputs and outputs of its buffers until they are used again, and two buffers for the last stage."""
    if layout.pp == 1:
        return 2
    return 7 if is_last else 1


def _at_rest(weights: StageWeights, layout: Layout, work: Work) -> StageMemory:
    each, trained = work.bytes_each, weights.trained
    plain = (weights.base - weights.quantised) * each
    quantised = weights.quantised * _QUANTISED[work.adapters.bits] if work.adapters and work.adapters.bits else 0.0
    return StageMemory(
        stage=0, moment="rest", weights=plain + quantised, gradients=4.0 * trained,
        optimizer=(4.0 + _MOMENTS[work.optimizer]) * trained / layout.dp, activations=0.0, logits=0.0,
        buffers=0.0,
    )  # fmt: skip


def _layer_moment(rest: StageMemory, held: float, before: float, kept: Activations, model: Architecture, work: Work) -> StageMemory:
    again = kept.whole - kept.kept(work.recompute) + kept.scores if work.recompute != "none" else 0.0
    return replace(rest, moment="layer", gradients=rest.gradients + before, activations=held + again + kept.backward)


def _loss_moment(
    rest: StageMemory, held: float, before: float, model: Architecture, layout: Layout, work: Work, each: int
) -> StageMemory:  # fmt: skip
    trained = work.trained_tokens
    at_once = min(trained, work.logits_chunk_tokens or trained)
    copies = 12.0 if layout.tp == 1 else (8.0 + each)  # logits, probabilities and gradients in float32; on several ranks in place
    logits = at_once * model.vocabulary_on(layout.tp) * copies
    normed = trained * model.hidden * (4 + 2 * each)
    if at_once < trained:  # gradients of the head's weights are summed over chunks
        normed += trained * model.hidden * each
        if work.adapters is None:
            before += model.vocabulary_on(layout.tp) * (model.embedding_size or model.hidden) * (4 + each)
    return replace(rest, moment="loss", gradients=rest.gradients + before, activations=held + normed, logits=logits)


def _exchange_moment(rest: StageMemory, lives_on: float, weights: StageWeights, layout: Layout, work: Work) -> StageMemory:
    trained = weights.trained
    if work.dtype == "fp32":
        part = 4.0 * trained / layout.dp if layout.dp > 1 else 0.0  # a rank's own, beside all of them
        return replace(rest, moment="exchange", gradients=rest.gradients + part, buffers=2 * 4.0 * bucket_elements(layout.dp))
    flat = 4.0 * trained if trained <= _FLAT_ELEMENTS else 0.0
    return replace(rest, moment="exchange", gradients=rest.gradients + lives_on, buffers=flat + 2.0 * trained)
