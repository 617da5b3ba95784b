"""Searches all layouts, micro-batches and recompute modes for the fastest that fits; if none fits, for the nearest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from sft.families.architecture import Architecture
from sft.plan.chunks import tokens_at_once
from sft.plan.clock import Seconds
from sft.plan.communicators import communicators
from sft.plan.gpus import GB, Gpu
from sft.plan.layout import Layout, ModelShape, choose_layout
from sft.plan.memory import StageMemory, Work, stage_memory
from sft.plan.rows import Batches, Rows
from sft.plan.speed import OURS, Program, iteration_seconds, model_operations
from sft.plan.stage_weights import Adapters
from sft.plan.stages import head_cost, layer_ranges
from tokenize_data.errors import UserError

RECOMPUTES = ("none", "selective", "full")
_MOST_MICRO_BATCH = 64
_SPARE = 1.1  # rows of other iterations may have more trained tokens than the sampled ones


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is known before the layout: model, data, machine. None means that the search may choose."""

    model: Architecture
    shape: ModelShape
    batches: Batches
    world: int
    seq: int
    global_batch: int
    trained_share: float
    gpu: Gpu
    dtype: str = "bf16"
    optimizer: str = "adamw"
    momentum: float = 0.0
    adapters: Adapters | None = None
    tp: int | None = None
    pp: int | None = None
    dp: int | None = None
    micro_batch: int | None = None
    recompute: str | None = None
    sequence_parallel: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One layout with micro-batch and recompute mode, its memory and time."""

    layout: Layout
    micro_batch: int
    recompute: str
    rows: Rows
    ranges: tuple[range, ...]
    work: Work
    memory: tuple[StageMemory, ...]  # per stage
    seconds: Seconds
    mfu: float
    usable_bytes: int

    @property
    def peak(self) -> StageMemory:
        return max(self.memory, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool:
        return self.peak.total <= self.usable_bytes

    @property
    def flags(self) -> dict[str, str]:
        return {
            "tp": str(self.layout.tp),
            "pp": str(self.layout.pp),
            "micro_batch": str(self.micro_batch),
            "recompute": self.recompute,
        }


@dataclass(frozen=True, kw_only=True)
class Found:
    """The result of a search: fitting choices, fastest first; choices that do not fit, smallest first; refused layouts
    with reasons.
    """

    fitting: tuple[Choice, ...]
    too_large: tuple[Choice, ...]
    refused: dict[tuple[int, int], str]


def evaluate(question: Question, layout: Layout, micro_batch: int, recompute: str, program: Program = OURS) -> Choice:
    """Compute memory and time of one choice. Raises UserError if the documents cannot be packed for it."""
    model, capacity = question.model, micro_batch * question.seq
    rows = question.batches.rows(capacity, layout.dp)
    most_trained = min(1.0, max(question.trained_share, _SPARE * rows.most_trained / capacity))
    work = Work(
        row_tokens=capacity,
        trained_share=most_trained,
        micro_batches=rows.micro_batches,
        recompute=recompute,
        dtype=question.dtype,
        optimizer=question.optimizer,
        momentum=question.momentum,
        adapters=question.adapters,
        document_tokens=rows.document_tokens,
        longest_document=min(question.batches.longest, capacity),
        logits_chunk_tokens=tokens_at_once(model.vocabulary_on(layout.tp), question.gpu.name != "cpu"),
    )
    ranges = _ranges(model.layers, layout.pp, head_cost(model, question.trained_share))
    memory = tuple(stage_memory(model, layout, stage, layers, work) for stage, layers in enumerate(ranges))
    usual = replace(work, trained_share=question.trained_share)
    seconds = iteration_seconds(
        model, layout, list(ranges), usual, question.gpu, program=program, tokens=rows.row_tokens
    )
    operations = model_operations(
        model, rows.tokens, trained_share=question.trained_share, document_tokens=rows.document_tokens
    )
    peak = (question.gpu.bf16_tflops if question.dtype == "bf16" else question.gpu.fp32_tflops) * 1e12
    return Choice(
        layout=layout,
        micro_batch=micro_batch,
        recompute=recompute,
        rows=rows,
        ranges=ranges,
        work=work,
        memory=memory,
        seconds=seconds,
        mfu=operations / seconds.total / layout.world / peak,
        usable_bytes=question.gpu.usable_bytes(communicators(layout)),
    )


@lru_cache(maxsize=256)
def _ranges(layers: int, pp: int, cost: float) -> tuple[range, ...]:
    return tuple(layer_ranges(layers, pp, head_cost=cost))


@lru_cache(maxsize=64)
def search(question: Question) -> Found:
    """Evaluate all choices. Given settings stay fixed."""
    fitting: list[Choice] = []
    too_large: list[Choice] = []
    refused: dict[tuple[int, int], str] = {}
    for layout in _layouts(question, refused):
        for choice in _choices(question, layout, refused):
            (fitting if choice.fits else too_large).append(choice)
    fitting.sort(key=lambda choice: (choice.seconds.total, choice.peak.total))
    too_large.sort(key=lambda choice: (choice.peak.total, choice.seconds.total))
    return Found(fitting=tuple(fitting), too_large=tuple(too_large), refused=refused)


def _choices(question: Question, layout: Layout, refused: dict[tuple[int, int], str]) -> Iterator[Choice]:
    for micro_batch in _micro_batches(question):
        for recompute in (question.recompute,) if question.recompute else RECOMPUTES:
            try:
                yield evaluate(question, layout, micro_batch, recompute)
            except UserError as error:
                refused.setdefault((layout.tp, layout.pp), str(error))


def _layouts(question: Question, refused: dict[tuple[int, int], str]) -> Iterator[Layout]:
    """All layouts; invalid ones are refused with training's own message."""
    sizes = [size for size in range(1, question.world + 1) if question.world % size == 0]
    for tp in (question.tp,) if question.tp else sizes:
        for pp in (question.pp,) if question.pp else sizes:
            if question.world % (tp * pp) and not (question.tp and question.pp):
                continue
            if question.dp is not None and question.dp * tp * pp != question.world:
                continue
            try:
                yield layout_of(question, tp, pp)
            except UserError as error:
                refused[tp, pp] = str(error)


def layout_of(question: Question, tp: int, pp: int) -> Layout:
    return choose_layout(
        question.world,
        question.shape,
        tp=tp,
        pp=pp,
        sequence_parallel=question.sequence_parallel,
        global_batch=question.global_batch,
    )


def _micro_batches(question: Question) -> list[int]:
    if question.micro_batch:
        return [question.micro_batch]
    most = max(1, min(_MOST_MICRO_BATCH, question.global_batch))
    return [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= most]


def best(question: Question) -> Choice:
    """The fastest choice that fits, or a UserError that suggests what would fit."""
    found = search(question)
    if found.fitting:
        return found.fitting[0]
    if not found.too_large:
        layout_of(question, question.tp or 1, question.pp or 1)  # raises the error
        raise UserError(next(iter(found.refused.values())))
    raise UserError(does_not_fit(question, found.too_large[0]))


def does_not_fit(question: Question, choice: Choice) -> str:
    """`does not fit: 93 GB on stage 0 of 80 GB; fits with --recompute selective (71 GB) or --pp 4 (52 GB)`."""
    gpu, peak = question.gpu, choice.peak
    if gpu.name == "cpu":
        needed = f"{peak.total / GB:.3g} GB of {gpu.memory_gb:g} GB a process on this computer"
        return (
            f"does not fit: {needed} with {_flags_of(choice)}: use --lora or a smaller model, or plan for GPUs "
            "with --gpu h100-80gb"
        )
    withheld = gpu.memory_gb - choice.usable_bytes / GB
    room = f"{gpu.memory_gb:g} GB" + (
        f" ({withheld:.2g} GB of them for CUDA, NCCL and fragments)" if withheld > 0.05 else ""
    )
    text = f"does not fit: {peak.total / GB:.3g} GB on stage {peak.stage} of {room} with {_flags_of(choice)}"
    nearest = nearest_that_fit(question, choice)
    if nearest:
        ways = [f"{_changes(choice, other)} ({other.peak.total / GB:.3g} GB)" for other in nearest]
        return f"{text}; fits with {', '.join(ways[:-1])}{' or ' if len(ways) > 1 else ''}{ways[-1]}"
    return f"{text}; no layout on {question.world} fits: {_with_more(question)}"


def nearest_that_fit(question: Question, choice: Choice) -> list[Choice]:
    """Fitting choices with the fewest changed settings: the fastest for each kind of change."""
    free = replace(question, tp=None, pp=None, micro_batch=None, recompute=None)
    found = search(free).fitting
    distance = {id(other): len(_changed(choice, other)) for other in found}
    fewest = min(distance.values(), default=0)
    kinds: dict[tuple[str, ...], Choice] = {}
    for other in found:
        if distance[id(other)] == fewest:
            kinds.setdefault(tuple(_changed(choice, other)), other)
    return sorted(kinds.values(), key=lambda other: other.seconds.total)[:3]


def _with_more(question: Question) -> str:
    for factor in (2, 4, 8, 16, 32, 64, 128):
        larger = replace(question, world=question.world * factor, tp=None, pp=None, micro_batch=None, recompute=None)
        found = search(larger).fitting
        if found:
            return f"{larger.world} GPUs do, with {_flags_of(found[0])} ({found[0].peak.total / GB:.3g} GB)"
    return "use a smaller model, a shorter --seq, --lora or --load_in_4bit"


def _changed(choice: Choice, other: Choice) -> list[str]:
    return [name for name, value in other.flags.items() if choice.flags[name] != value]


def _changes(choice: Choice, other: Choice) -> str:
    return " ".join(f"--{name} {other.flags[name]}" for name in _changed(choice, other))


def _flags_of(choice: Choice) -> str:
    return " ".join(f"--{name} {value}" for name, value in choice.flags.items())


def reason_it_loses(first: Choice, other: Choice) -> str:
    """Name the part of an iteration that is most slower than in the best choice."""
    slower = other.seconds.total - first.seconds.total
    parts = {
        "waiting in the pipeline": "bubble",
        "traffic of tensor ranks": "tensor_traffic",
        "traffic of stages": "pipeline_traffic",
        "traffic of replicas": "data_traffic",
        "computing again": "recompute",
        "small matrix products": "products",
        "work bound by memory": "memory_bound",
        "the optimizer": "optimizer",
        "attention": "attention",
        "the head": "head",
    }
    text, name = max(parts.items(), key=lambda part: getattr(other.seconds, part[1]) - getattr(first.seconds, part[1]))
    more = getattr(other.seconds, name) - getattr(first.seconds, name)
    if more <= 0 or slower <= 1e-9:
        return "as fast, with more memory"
    return f"{slower / first.seconds.total:.1%} slower: {_seconds(more)} more for {text}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.1f} ms"
