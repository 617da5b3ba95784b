"""Time of an iteration: matmuls, attention, memory-bound work, traffic, pipeline bubbles, the optimizer.

Physics with few constants: a product of matrices takes its operations over the GPU's rate, and its bytes over the
memory's; everything else moves bytes. Each kind of GPU has one efficiency for each rate (`gpus`), the same for all
models, layouts and programs. What differs between programs is which operations they do, which `Program` says: that is
how published runs of others are predicted too.
"""

from __future__ import annotations

from dataclasses import dataclass

from sft.families.architecture import Architecture, Linear
from sft.plan.clock import EXCHANGE_SECONDS, LAUNCH_SECONDS, Clock, Seconds
from sft.plan.gpus import Gpu
from sft.plan.layout import Layout
from sft.plan.memory import Work
from sft.plan.stage_weights import Adapters, stage_weights

_FLASH_SHARE = 0.75  # share of a matmul's rate
_FLASH_BACKWARD = 2.5  # relative to the forward pass's operations
_ADAM_BYTES = 32.0  # bytes read and written per weight of a rank's share


@dataclass(frozen=True, kw_only=True)
class Program:
    """What a training program does that takes time. Bytes are read and written per number of the named tensor."""

    norm_bytes: float
    residual_bytes: float
    gate_bytes: float  # the MLP's activation, per inner feature
    attention_bytes: float  # around attention: rotations, copies
    has_flash: bool = True
    backward_ratio: float = 2.0  # memory-bound work in the backward pass, relative to the forward pass
    launches: int = 12  # kernels per layer besides matmuls
    launch_seconds: float = 0.0  # Python time per kernel: a lower bound for a layer
    gradient_bytes: float = 4.0  # sent per weight
    accumulation_bytes: float = 0.0  # per weight and micro-batch
    step_bytes: float = 0.0  # per weight of a rank, however it is split over replicas: norms, clipping
    is_sharded: bool = True  # the optimizer, divided by replicas
    sends_are_split: bool = True  # between stages: each tensor rank sends its share
    head_bytes: float = 20.0  # the loss, per logit
    has_head_on_all: bool = False  # whether logits are computed for all tokens, trained or not


# Eager Hugging Face layers under DeepSpeed's pipeline, and an optimizer that sums and reduces gradients in float32.
OURS = Program(
    norm_bytes=34,
    residual_bytes=6,
    gate_bytes=10,
    attention_bytes=24,
    launches=45,
    launch_seconds=6e-6,
    gradient_bytes=4,
    accumulation_bytes=10,
    step_bytes=8,
    sends_are_split=False,
)


def iteration_seconds(
    model: Architecture,
    layout: Layout,
    ranges: list[range],
    work: Work,
    gpu: Gpu,
    *,
    program: Program = OURS,
    virtual_pp: int = 1,
    tokens: float | None = None,
) -> Seconds:
    """The time of one update. `tokens` is a row's mean, if rows are not full."""
    clock = Clock(gpu, work.dtype)
    tokens = float(work.row_tokens) if tokens is None else tokens
    layer = _layer(model, layout, work, clock, program, tokens)
    stages = [
        _stage(model, layout, number, layers, layer, work, clock, program, tokens)
        for number, layers in enumerate(ranges)
    ]
    slowest = max(stages, key=lambda stage: stage.total)
    others = sum(stage.total for stage in stages) - slowest.total
    sent = (
        model.hidden
        * tokens
        * work.bytes_each
        / (layout.tp if program.sends_are_split or layout.sequence_parallel else 1)
    )
    transfer = sent / clock.stages_bandwidth(layout) + EXCHANGE_SECONDS
    exposed = 4 * virtual_pp * transfer if layout.pp > 1 else 0.0  # an input and an output, forward and backward
    return slowest.times(work.micro_batches).plus(
        Seconds(
            bubble=others / virtual_pp,
            pipeline_traffic=work.micro_batches * exposed + (layout.pp - 1) * 2 * transfer,
            data_traffic=_data_traffic(model, layout, ranges, work, clock, program),
            optimizer=_optimizer(model, layout, ranges, work, clock, program),
        )
    )


def _layer(model: Architecture, layout: Layout, work: Work, clock: Clock, program: Program, tokens: float) -> Seconds:
    """A layer's time for one micro-batch, forward and backward."""
    products = sum(clock.product(tokens, *_turned(linear, model, layout)) for linear in model.linears)
    attention, attention_backward = _attention(model, layout, work, clock, program, tokens)
    bound = _memory_bound(model, layout, clock, program, tokens)
    hidden_bytes = model.hidden * tokens * work.bytes_each
    traffic = 2 * clock.all_reduce(hidden_bytes, layout.tp)
    backward_products = _backward_products(products, model, layout, work, clock, tokens)
    again = {
        "none": 0.0,
        "selective": attention if not program.has_flash else bound,
        "full": products + attention + bound,
    }[work.recompute]
    computed = Seconds(
        products=products + backward_products,
        attention=attention + attention_backward,
        memory_bound=bound * (1 + program.backward_ratio),
        recompute=again,
        tensor_traffic=traffic * (3 if work.recompute == "full" else 2),
    )
    passes = 3 if work.recompute == "full" else 2
    least = passes * (program.launches + len(model.linears)) * program.launch_seconds
    idle = max(0.0, least - computed.compute)
    return computed.plus(Seconds(memory_bound=idle))


def _turned(linear: Linear, model: Architecture, layout: Layout) -> tuple[int, int]:
    inputs, outputs = linear.shape_on(layout.tp, model.head_size)
    return outputs, inputs


def _backward_products(
    products: float, model: Architecture, layout: Layout, work: Work, clock: Clock, tokens: float
) -> float:
    """Backward matmuls: twice the forward pass, for inputs and weights. Frozen weights need only the first, and
    adapters are two thin matmuls each.
    """
    if work.adapters is None:
        return 2 * products
    thin = 3 * sum(_adapter_product(linear, model, layout, work.adapters, clock, tokens) for linear in model.linears)
    if not work.adapters.quantisation:
        return products + thin
    weights = sum(
        inputs * outputs
        for inputs, outputs in (linear.shape_on(layout.tp, model.head_size) for linear in model.linears)
    )
    return products + thin + 2 * clock.moved(weights * (2 + 2 + work.adapters.quantisation.bits / 8))


def _adapter_product(
    linear: Linear, model: Architecture, layout: Layout, adapters: Adapters, clock: Clock, tokens: float
) -> float:
    inputs, outputs = linear.shape_on(layout.tp, model.head_size)
    return clock.product(tokens, adapters.rank, inputs) + clock.product(tokens, outputs, adapters.rank)


def _attention(
    model: Architecture, layout: Layout, work: Work, clock: Clock, program: Program, tokens: float
) -> tuple[float, float]:
    """(forward, backward) time of attention within documents."""
    length = min(work.document_tokens or tokens, tokens)
    heads = max(model.heads // layout.tp, 1)
    if program.has_flash and not model.attention_softcap:
        operations = 2 * tokens * length * heads * model.head_size
        forward = operations / (clock.rate * _FLASH_SHARE) + LAUNCH_SECONDS
        return forward, _FLASH_BACKWARD * forward
    count = heads * tokens / length
    products = clock.product(length, length, model.head_size, count) + clock.product(
        length, model.head_size, length, count
    )
    scores = count * length * length
    return products + clock.moved(9 * scores, 2), 2 * products + clock.moved(13 * scores, 2)


def _memory_bound(model: Architecture, layout: Layout, clock: Clock, program: Program, tokens: float) -> float:
    hidden = model.hidden * tokens / (layout.tp if layout.sequence_parallel else 1)
    moved = hidden * (model.num_norms * program.norm_bytes + 2 * program.residual_bytes)
    moved += program.gate_bytes * model.intermediate / layout.tp * tokens
    moved += program.attention_bytes * model.queries / layout.tp * tokens
    return clock.moved(moved, program.launches)


def _stage(
    model: Architecture,
    layout: Layout,
    number: int,
    layers: range,
    layer: Seconds,
    work: Work,
    clock: Clock,
    program: Program,
    tokens: float,
) -> Seconds:
    """A stage's time for one micro-batch."""
    seconds = layer.times(len(layers))
    if number == layout.pp - 1:
        trained = tokens if program.has_head_on_all else tokens * work.trained_share
        columns = model.vocabulary_on(layout.tp)
        passes = 2 if work.adapters else 3
        head = passes * clock.product(trained, columns, model.hidden) + clock.moved(
            program.head_bytes * trained * columns, 5
        )
        seconds = seconds.plus(Seconds(head=head))
    trained_weights = stage_weights(model, layout, number, layers, work.adapters).trained
    added = clock.moved(program.accumulation_bytes * trained_weights) if program.accumulation_bytes else 0.0
    return seconds.plus(Seconds(memory_bound=added))


def _most_trained(model: Architecture, layout: Layout, ranges: list[range], work: Work) -> int:
    return max(
        stage_weights(model, layout, number, layers, work.adapters).trained for number, layers in enumerate(ranges)
    )


def _data_traffic(
    model: Architecture, layout: Layout, ranges: list[range], work: Work, clock: Clock, program: Program
) -> float:
    """Time to sum gradients over replicas and to send updated weights."""
    if layout.dp == 1:
        return 0.0
    weights = _most_trained(model, layout, ranges, work)
    rounds = 2 * program.gradient_bytes + (work.bytes_each if program.is_sharded else 0)
    if program.is_sharded and program.gradient_bytes == 4:  # reduce-scatter, then all-gather
        rounds = program.gradient_bytes + work.bytes_each
    return rounds * weights * (layout.dp - 1) / layout.dp / clock.replicas_bandwidth(layout)


def _optimizer(
    model: Architecture, layout: Layout, ranges: list[range], work: Work, clock: Clock, program: Program
) -> float:
    weights = _most_trained(model, layout, ranges, work)
    return clock.moved(weights * (_ADAM_BYTES / (layout.dp if program.is_sharded else 1) + program.step_bytes))


def model_operations(
    model: Architecture, tokens: float, *, trained_share: float = 1.0, document_tokens: float
) -> float:
    """The operations of an update over `tokens` as MFU counts them: forward and backward, without recomputation. The
    head counts trained tokens only; attention counts the whole document for each token, as is customary.
    """
    layers = model.layers * (
        sum(2 * linear.inputs * linear.outputs for linear in model.linears) + 4 * document_tokens * model.queries
    )
    return 3 * tokens * (layers + 2 * model.head_weights * trained_share)
