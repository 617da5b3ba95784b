"""Prints a plan: what will be done, memory and time, alternatives, and formulas with their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from sft.observe.progress import duration
from sft.plan.answer import Plan, first_choices
from sft.plan.gpus import GB
from sft.plan.search import Choice
from sft.plan.words import rounded, span

_KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
_PARTS = (
    ("compute", "compute"),
    ("bubble", "waiting in the pipeline"),
    ("tensor_traffic", "tensor-parallel traffic"),
    ("pipeline_traffic", "pipeline traffic"),
    ("data_traffic", "data-parallel traffic"),
    ("optimizer", "optimizer"),
)


def show_plan(console: Console, plan: Plan) -> None:
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, text in _facts(plan):
        facts.add_row(name, Text(text))
    console.print(Rule("plan", align="left", style="dim"), facts)
    console.print(_memory_table(plan), _choices_table(plan))
    for (tp, pp), reason in list(plan.found.refused.items())[:3]:
        console.print(Text(f"refused  tp {tp} pp {pp}: {reason}", style="dim"))
    for note in plan.notes:
        console.print(Text(f"note  {note}", style="dim"))


def _facts(plan: Plan) -> list[tuple[str, str]]:
    question, choice, layout = plan.question, plan.choice, plan.choice.layout
    rows, total = choice.rows, plan.total_seconds
    return [
        ("model", f"{plan.name} ({plan.model.kind}), {rounded(plan.num_parameters)} parameters{_trained(plan)}"),
        ("machine", f"{question.world:,} x {question.gpu.name}, {question.gpu.memory_gb:g} GB each"),
        ("data", _data(plan)),
        ("iterations", _iterations(plan)),
        *([("learning rate", plan.learning_rate)] if plan.learning_rate else []),
        (
            "batch",
            f"{question.global_batch:,} documents, {rows.tokens:,.0f} tokens, {rows.micro_batches} micro-batches for "
            "each replica; "
            f"rows {rows.fill:.1%} full, replicas {rows.balance:.1%} balanced",
        ),
        (
            "layout",
            (
                f"tp {layout.tp} x pp {layout.pp} x dp {layout.dp}, sequence parallel "
                f"{'on' if layout.sequence_parallel else 'off'}"
            ),
        ),
        ("", f"rows of {choice.micro_batch} x {question.seq:,} tokens, recompute {choice.recompute}, {question.dtype}"),
        ("layers", f"{_layers(choice)} a stage" if layout.pp > 1 else f"{plan.model.layers}, all in one stage"),
        ("iteration", f"{span(choice.seconds.total)}: {_parts(choice)}"),
        ("", f"{plan.tokens_per_second:,.0f} tokens/s, MFU {choice.mfu:.1%}"),
        (
            "duration",
            "not known: see the notes"
            if total is None
            else f"{duration(total)}, {total / 3600 * question.world:,.1f} GPU-hours",
        ),
        (
            "files",
            f"a checkpoint {plan.checkpoint_bytes / 1e9:,.3g} GB (of 10^9 bytes), "
            f"the {'adapter' if question.adapters else 'model'} {plan.exported_bytes / 1e9:,.3g} GB",
        ),
    ]


def _trained(plan: Plan) -> str:
    adapters = plan.question.adapters
    if adapters is None:
        return ""
    bits = f", the rest in {adapters.quantisation.bits} bits" if adapters.quantisation else ""
    return f", {rounded(plan.num_trained)} of adapters trained{bits}"


def _data(plan: Plan) -> str:
    data = plan.data
    if data.documents is None:
        return "not known"
    trained = f", {data.trained_tokens:,.0f} trained" if data.trained_tokens is not None else ""
    return f"{data.documents:,} documents, {data.tokens or 0:,.0f} tokens an epoch{trained} ({data.source})"


def _iterations(plan: Plan) -> str:
    if plan.iterations is None:
        return "not known: see the notes"
    if plan.epochs is None:
        return f"{plan.iterations:,}, as given"
    documents, batch = plan.data.documents, plan.question.global_batch
    return f"ceil({plan.epochs:g} epochs x {documents or 0:,} documents / {batch:,}) = {plan.iterations:,}"


def _layers(choice: Choice) -> str:
    counts = [len(layers) for layers in choice.ranges]
    if len(set(counts)) == 1:
        return str(counts[0])
    return ", ".join(str(count) for count in counts)


def _parts(choice: Choice) -> str:
    shown = [(text, getattr(choice.seconds, name)) for name, text in _PARTS]
    return ", ".join(f"{text} {value / choice.seconds.total:.1%}" for text, value in shown if value > 0)


def _memory_table(plan: Plan) -> Table:
    """Memory by stage; of many equal stages only the first."""
    table = Table(
        box=None, padding=(0, 2, 0, 0), title_justify="left", title=f"memory of a rank at its peak, GB of {_room(plan)}"
    )
    table.add_column("stage", justify="right")
    for kind in (*_KINDS, "total"):
        table.add_column(kind, justify="right")
    table.add_column("peak at")
    stages = plan.choice.memory
    for number, stage in enumerate(stages):
        if len(stages) > 8 and 2 <= number < len(stages) - 2:
            continue
        values = [f"{getattr(stage, kind) / GB:.2f}" for kind in (*_KINDS, "total")]
        table.add_row(str(stage.stage), *values, stage.moment)
    return table


def _room(plan: Plan) -> str:
    gpu = plan.question.gpu
    return f"{gpu.memory_gb:g}, of which {gpu.memory_gb - plan.choice.usable_bytes / GB:.3g} are not for tensors"


def _choices_table(plan: Plan) -> Table:
    considered = len(plan.found.fitting) + len(plan.found.too_large)
    title = f"the best of {considered} choices, {len(plan.found.too_large)} of which do not fit"
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left", title=title)
    for name in ("tp", "pp", "dp", "micro-batch", "recompute", "GB", "iteration"):
        table.add_column(name, justify="right")
    table.add_column("")
    for choice, reason in first_choices(plan):
        layout = choice.layout
        table.add_row(
            str(layout.tp),
            str(layout.pp),
            str(layout.dp),
            str(choice.micro_batch),
            choice.recompute,
            f"{choice.peak.total / GB:.1f}",
            span(choice.seconds.total),
            reason,
        )
    return table


def show_scaling(console: Console, rows: Sequence[tuple[int, Plan | str]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left", title="with other numbers of GPUs")
    for name in (
        "GPUs",
        "layout",
        "micro-batch",
        "recompute",
        "GB",
        "iteration",
        "tokens/s",
        "efficiency",
        "hours",
        "GPU-hours",
    ):
        table.add_column(name, justify="right" if name != "layout" else "left")
    first = next((plan.tokens_per_second / count for count, plan in rows if isinstance(plan, Plan)), 1.0)
    for count, plan in rows:
        if isinstance(plan, str):
            console.print(Text(f"{count} GPUs: {plan}", style="dim"))
            continue
        choice, total = plan.choice, plan.total_seconds
        table.add_row(
            f"{count:,}",
            str(choice.layout),
            str(choice.micro_batch),
            choice.recompute,
            f"{choice.peak.total / GB:.1f}",
            span(choice.seconds.total),
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.tokens_per_second / count / first:.0%}",
            "?" if total is None else f"{total / 3600:,.1f}",
            "?" if total is None else f"{total / 3600 * count:,.0f}",
        )
    console.print(table)


def write_scaling_chart(rows: Sequence[tuple[int, Plan | str]], path: Path) -> bool:
    """Draw the chart. Returns False if matplotlib is missing or there is nothing to draw."""
    points = [(count, plan.tokens_per_second) for count, plan in rows if isinstance(plan, Plan)]
    if not points:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    counts, speeds = zip(*points, strict=True)
    axes.plot(counts, speeds, marker="o", color="#4c72b0", label="planned")
    axes.plot(
        counts,
        [speeds[0] * count / counts[0] for count in counts],
        color="#8c8c8c",
        linestyle="--",
        label="as the first, times GPUs",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("GPUs")
    axes.set_ylabel("tokens/s")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, format="png")
    return True
