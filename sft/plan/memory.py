"""Peak memory of a rank while it trains, by kind: a model of this engine, checked against measured peaks.

T tokens in a row, w bytes of a number (2 in bf16, 4 in float32), W weights of a rank, d replicas. What is counted:

- at rest: weights wW; of the trained ones the optimizer's states and, in bf16, float32 masters, each owned by one of d
  replicas;
- gradients: float32 sums 4W from the first micro-batch on, and the one gradient that is about to be added to its sum.
  So full fine-tuning
  in bf16 with AdamW takes 2 + 4 + 8 + 4 = 18 bytes for each weight on one replica;
- activations: what each layer keeps for its backward pass, for every micro-batch that a stage has in flight (1F1B:
  stages that follow, plus
  one), and what the backward pass of one layer holds for a moment;
- logits: of trained tokens alone, in float32, with their gradients;
- buffers: what the optimizer makes for a moment of its largest tensor.

The peak is the greatest of the moments at which these meet: the loss, a layer's backward pass, the embedding's, the
exchange of gradients between replicas (sums and the part of them that a replica owns), the update.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sft.config.optimizer import kind_of
from sft.families.architecture import Architecture
from sft.plan.activations import Activations, activations_of
from sft.plan.layout import Layout
from sft.plan.stage_weights import Adapters, StageWeights, adapted_linears, stage_weights, vocabulary_weights

_SMALL_ELEMENTS, _LEAST_ROWS, _BUNDLE_ELEMENTS = 2**16, 8, 2.0**25  # as `optimizer.ownership` has them
_UPDATE_BYTES = {"adafactor": 16.0, "muon": 20.0}  # temporary bytes per weight of the tensor that is updated


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of each rank: what memory and time depend on besides the layout."""

    row_tokens: int  # capacity of a row: micro_batch * seq
    trained_share: float  # share of the tokens
    micro_batches: int
    recompute: str
    dtype: str = "bf16"
    optimizer: str = "adamw"
    momentum: float = 0.0  # of SGD
    adapters: Adapters | None = None
    document_tokens: float | None = None  # mean length, which limits attention. None: as long as a row
    longest_document: int | None = None  # None: as long as a row
    logits_chunk_tokens: int | None = None  # number of tokens whose loss is computed at once

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


def kept_of(model: Architecture, layout: Layout, work: Work) -> Activations:
    ranks = work.adapters.rank * len(adapted_linears(model, work.adapters)) if work.adapters else None
    return activations_of(model, layout, work.row_tokens, work.bytes_each, longest=work.longest_document, ranks=ranks)


def stage_memory(model: Architecture, layout: Layout, stage: int, layers: range, work: Work) -> StageMemory:
    """The peak memory of a rank of `stage`, which has `layers`."""
    weights = stage_weights(model, layout, stage, layers, work.adapters)
    is_first, is_last = stage == 0, stage == layout.pp - 1
    kept = kept_of(model, layout, work)
    rest = _at_rest(weights, layout, work)
    each = work.bytes_each
    in_flight = min(layout.pp - stage, work.micro_batches)
    held = in_flight * (len(layers) * kept.kept(work.recompute) + kept.boundary * (2 if not is_first else 1))
    stale = kept.boundary * _stale_boundaries(layout, is_last)  # what the engine has not freed yet
    held += max(0.0, stale - 3 * kept.boundary)
    moments = [_layer_moment(rest, held, kept, weights, model, layout, work)]
    if is_last:
        moments.append(_loss_moment(rest, held, weights, model, layout, work, each))
    moments += _last_moments(rest, kept, weights, model, layout, work, is_first=is_first)
    for moment in (
        _exchange_moment(rest, weights, model, layout, layers, work),
        _update_moment(rest, weights, layout, work),
    ):
        moments.append(replace(moment, activations=stale))
    peak = max(moments, key=lambda moment: moment.total)
    return replace(peak, stage=stage)


def _stale_boundaries(layout: Layout, is_last: bool) -> int:
    """DeepSpeed's pipeline keeps its buffers' inputs and outputs until the next use, and two buffers in the last
    stage.
    """
    if layout.pp == 1:
        return 2
    return 7 if is_last else 1


def _at_rest(weights: StageWeights, layout: Layout, work: Work) -> StageMemory:
    plain = (weights.base - weights.quantised) * work.bytes_each
    kept_in = work.adapters.quantisation if work.adapters else None
    quantised = weights.quantised * kept_in.bytes_each if kept_in else 0.0
    return StageMemory(
        stage=0,
        moment="rest",
        weights=plain + quantised,
        gradients=0.0,
        optimizer=_owned(weights, layout, work),
        activations=0.0,
        logits=0.0,
        buffers=0.0,
    )


def _owned(weights: StageWeights, layout: Layout, work: Work) -> float:
    """Master weights and states of what a replica owns. If tensors stay whole, the owner of the largest may have more
    than its share.
    """
    kind = kind_of(work.optimizer, work.momentum)
    ends = 0 if kind.is_factored else weights.ends  # factored moments are not larger for them
    masters = 4.0 if work.dtype == "bf16" else 0.0
    every = masters * weights.trained + kind.matrix_bytes * (weights.trained - ends) + kind.other_bytes * ends
    share = 1 / layout.dp
    if kind.needs_whole_matrices and weights.trained:
        share = max(share, min(1.0, weights.largest / weights.trained))
    return every * share


def _sums(weights: StageWeights, work: Work) -> float:
    """Gradient sums of earlier micro-batches."""
    return 4.0 * weights.trained if work.micro_batches > 1 else 0.0


def _passing(largest: float, work: Work) -> float:
    """A gradient before it is added to its sum; in float32 the first one is the sum itself."""
    return work.bytes_each * largest if work.dtype == "bf16" or work.micro_batches > 1 else 0.0


def _layer_moment(
    rest: StageMemory,
    held: float,
    kept: Activations,
    weights: StageWeights,
    model: Architecture,
    layout: Layout,
    work: Work,
) -> StageMemory:
    again = kept.whole - kept.kept(work.recompute) + kept.scores if work.recompute != "none" else 0.0
    shapes = (linear.shape_on(layout.tp, model.head_size) for linear in model.linears)
    largest = max(inputs * outputs for inputs, outputs in shapes) if work.adapters is None else 0
    return replace(
        rest,
        moment="layer",
        gradients=_sums(weights, work) + _passing(largest, work),
        activations=held + again + kept.backward,
    )


def _last_moments(
    rest: StageMemory,
    kept: Activations,
    weights: StageWeights,
    model: Architecture,
    layout: Layout,
    work: Work,
    *,
    is_first: bool,
) -> list[StageMemory]:
    """The end of a backward pass: one layer's activations are left, and all sums exist except the embedding's."""
    shapes = (linear.shape_on(layout.tp, model.head_size) for linear in model.linears)
    largest = max(inputs * outputs for inputs, outputs in shapes) if work.adapters is None else 0
    embedding = (
        vocabulary_weights(model, layout) if is_first and work.adapters is None and work.micro_batches == 1 else 0
    )
    layer = replace(
        rest,
        moment="first layer",
        gradients=4.0 * (weights.trained - embedding) + _passing(largest, work),
        activations=kept.whole + kept.backward + kept.boundary,
    )
    every = 4.0 * weights.trained + _passing(weights.largest, work)
    return [layer, replace(rest, moment="embedding", gradients=every, activations=2 * kept.boundary)]


def _loss_moment(
    rest: StageMemory, held: float, weights: StageWeights, model: Architecture, layout: Layout, work: Work, each: int
) -> StageMemory:
    trained = work.trained_tokens
    at_once = min(trained, work.logits_chunk_tokens or trained)
    copies = (
        12.0 if layout.tp == 1 else (8.0 + each)
    )  # logits, probabilities and gradients in float32; in place on several ranks
    logits = at_once * model.vocabulary_on(layout.tp) * copies
    normed = trained * model.hidden * (4 + 2 * each)
    passing = 0.0
    if at_once < trained:  # gradients of the head's weights are summed over chunks
        normed += trained * model.hidden * each
        if work.adapters is None:
            passing = vocabulary_weights(model, layout) * (4 + each)
    return replace(
        rest, moment="loss", gradients=_sums(weights, work) + passing, activations=held + normed, logits=logits
    )


def _exchange_moment(
    rest: StageMemory, weights: StageWeights, model: Architecture, layout: Layout, layers: range, work: Work
) -> StageMemory:
    """The exchange of gradients: sums are kept until all have arrived."""
    part = 4.0 * weights.trained / layout.dp if layout.dp > 1 else 0.0
    copied = 4.0 * _bundled(model, layout, layers, work)
    return replace(rest, moment="exchange", gradients=4.0 * weights.trained + part, buffers=copied)


def _bundled(model: Architecture, layout: Layout, layers: range, work: Work) -> float:
    """Weights that are copied to be sent together: small tensors, and those with one owner."""
    dp = layout.dp
    if dp == 1:
        return 0.0
    shapes = [linear.shape_on(layout.tp, model.head_size) for linear in model.linears]
    sizes = [(outputs, inputs * outputs) for inputs, outputs in shapes]  # rows, weights
    if work.adapters is not None:
        rank = work.adapters.rank
        adapted = [linear.shape_on(layout.tp, model.head_size) for linear in adapted_linears(model, work.adapters)]
        sizes = [size for inputs, outputs in adapted for size in ((rank, rank * inputs), (outputs, rank * outputs))]
    is_whole = kind_of(work.optimizer, work.momentum).needs_whole_matrices
    bundled = [n for rows, n in sizes if is_whole or n < _SMALL_ELEMENTS or (rows % dp and rows < _LEAST_ROWS * dp)]
    vectors = model.norm_weights if work.adapters is None else 0
    return min(float(len(layers) * (sum(bundled) + vectors)), max(_BUNDLE_ELEMENTS, 4.0 * dp * max(bundled, default=0)))


def _update_moment(rest: StageMemory, weights: StageWeights, layout: Layout, work: Work) -> StageMemory:
    whole = weights.largest * layout.tp  # gathered from tensor ranks
    return replace(
        rest,
        moment="update",
        gradients=4.0 * weights.trained / layout.dp,
        buffers=_UPDATE_BYTES.get(work.optimizer, 0.0) * whole,
    )
