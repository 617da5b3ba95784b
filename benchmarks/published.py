"""Predicted against published: training runs of others, in `benchmarks/data/published_runs.csv`, by the plan's model of
time.

    python benchmarks/published.py [--runs FILE]

writes benchmarks/results/published.md and published.png. A kind of GPU has one set of constants, whatever was trained
on it. What differs between programs is what they did: Megatron of 2021 and 2022 fused norms and biases, but had no
flash attention; Nanotron had it. Both computed the logits of all tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path.pop(0)  # this folder has a tokenize.py, and so has the standard library
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import csv
import statistics
from dataclasses import dataclass, replace
from typing import Any

from sft.families.architecture import Architecture
from sft.families.table import architecture_of
from sft.plan.clock import Seconds
from sft.plan.gpus import find_gpu
from sft.plan.layout import Layout
from sft.plan.memory import Work
from sft.plan.speed import Program, iteration_seconds, model_operations
from sft.plan.stages import layer_ranges

ROOT = Path(__file__).resolve().parent
_MEGATRON = Program(
    norm_bytes=4,
    residual_bytes=7,
    gate_bytes=4,
    attention_bytes=0,
    has_flash=False,
    launches=5,
    gradient_bytes=4,
    is_sharded=False,
    has_head_on_all=True,
)
# What the runs' names say is in the table; their shapes are those of the benchmark's own script
# (scripts/scaling_benchmarks.py).
_NANOTRON = replace(
    _MEGATRON,
    residual_bytes=6,
    gate_bytes=6,
    attention_bytes=4,
    has_flash=True,
    backward_ratio=1.7,
    launches=6,
    is_sharded=True,
)
_NANOTRON_SHAPES = {  # layers, hidden, inner, heads; small models tie embedding and head
    "1.34B": (16, 2048, 8192, 32),
    "3.57B": (28, 3072, 8192, 32),
    "8.86B": (32, 4096, 14336, 32),
    "80B": (80, 8192, 28672, 64),
}
_NANOTRON_VOCABULARY = 131072


@dataclass(frozen=True, kw_only=True)
class Comparison:
    run: dict[str, str]
    predicted: float
    measured: float
    seconds: Seconds
    bubble_share: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def compare(run: dict[str, str]) -> Comparison:
    model = _model(run)
    is_nanotron = run["source"].startswith("nanotron")
    layout = Layout(
        tp=int(run["tp"]),
        pp=int(run["pp"]),
        dp=int(run["dp"]),
        sequence_parallel=is_nanotron or run["sequence_parallel"] == "yes",
    )
    seq, batch, micro_batch = int(run["seq"]), int(run["global_batch"]), int(run["micro_batch"])
    work = Work(
        row_tokens=seq * micro_batch,
        trained_share=1.0,
        micro_batches=batch // (micro_batch * layout.dp),
        recompute=run["recompute"],
        document_tokens=seq,
    )
    program = _NANOTRON if is_nanotron else _MEGATRON
    if run["dtype"] == "fp16":
        program = replace(program, gradient_bytes=2)
    gpu = find_gpu(run["gpu"])
    head_cost = (
        model.head_weights / model.layer_weights if is_nanotron else 0.0
    )  # it cuts stages by operations, Megatron by layers
    ranges = layer_ranges(model.layers, layout.pp, head_cost=head_cost)
    seconds = iteration_seconds(model, layout, ranges, work, gpu, program=program, virtual_pp=int(run["virtual_pp"]))
    per_gpu = 1 / seconds.total / layout.world
    operations = model_operations(model, batch * seq, document_tokens=seq)
    predicted = {
        "s/iteration": seconds.total,
        "TFLOP/s/GPU": _with_recomputation(model, batch, seq) * per_gpu / 1e12,
        "% MFU": 100 * operations * per_gpu / (gpu.bf16_tflops * 1e12),
    }[run["unit"]]
    return Comparison(
        run=run,
        predicted=predicted,
        measured=float(run["measured"]),
        seconds=seconds,
        bubble_share=seconds.bubble / seconds.total,
    )


def _model(run: dict[str, str]) -> Architecture:
    if run["source"].startswith("nanotron"):
        layers, hidden, inner, heads = _NANOTRON_SHAPES[run["model"]]
        config = {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_attention_heads": heads,
        }
        config |= {"model_type": "llama", "vocab_size": _NANOTRON_VOCABULARY, "tie_word_embeddings": inner < 10_000}
        return architecture_of(config)
    shape = {
        "num_hidden_layers": "layers",
        "hidden_size": "hidden",
        "num_attention_heads": "attention_heads",
        "vocab_size": "vocab",
    }
    return architecture_of({"model_type": "gpt_neox", **{name: int(run[column]) for name, column in shape.items()}})


def _with_recomputation(model: Architecture, batch: int, seq: int) -> float:
    """Operations as Narayanan 2021 counts them: layers four times, the last time for recomputation, and the head three
    times.
    """
    h, l, v = model.hidden, model.layers, model.vocabulary  # noqa: E741
    return 96 * batch * seq * l * h * h * (1 + seq / (6 * h) + v / (16 * l * h))


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def table(comparisons: list[Comparison]) -> str:
    errors = [abs(comparison.error) for comparison in comparisons]
    a100, h100 = find_gpu("a100-80gb"), find_gpu("h100-80gb")
    lines = [
        "# Published training runs, predicted",
        "",
        (
            "`python benchmarks/published.py` computes this from `benchmarks/data/published_runs.csv`: no GPU is "
            "used, and none of the"
        ),
        (
            "runs was repeated. Constants are those of `sft/plan/gpus.py`: one efficiency for matrix products on "
            "each kind of GPU"
        ),
        (
            f"(A100 {a100.matrix_efficiency}, H100 {h100.matrix_efficiency}), set for all its runs together; for "
            "memory, links and"
        ),
        "networks the same on both.",
        "",
        f"Median error {statistics.median(errors):.1%}, worst {max(errors):.1%}, {len(errors)} runs.",
        "",
        "| source | model | GPUs | tp x pp x dp | recompute | published | predicted | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for comparison in comparisons:
        run = comparison.run
        lines.append(
            f"| {run['source']} | {run['model']} | {run['gpus']} {run['gpu']} "
            f"| {run['tp']} x {run['pp']} x {run['dp']} | {run['recompute']} "
            f"| {comparison.measured:g} {run['unit']} | {comparison.predicted:.4g} | {comparison.error:+.1%} |"
        )
    return "\n".join(lines) + "\n"


def plot(comparisons: list[Comparison], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    names = [f"{c.run['model']}\n{c.run['recompute']}" for c in comparisons]
    places = list(range(len(names)))
    axes.axhspan(-10, 10, color="0.92")
    axes.bar(places, [100 * comparison.error for comparison in comparisons], color="tab:blue", width=0.6)
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set_xticks(places, names, fontsize=7)
    axes.set_ylim(-21, 21)
    axes.set_ylabel("predicted over published, % (grey: within 10 %)")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "data" / "published_runs.csv", help="a table with the same columns"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "results", help="where published.md and published.png are written"
    )
    arguments = parser.parse_args()
    comparisons = [compare(run) for run in read(arguments.runs)]
    text = table(comparisons)
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "published.md").write_text(text)
    plot(comparisons, arguments.out / "published.png")


if __name__ == "__main__":
    main()
