"""Each formula of a plan with its numbers."""

from __future__ import annotations

from sft.config.optimizer import kind_of
from sft.plan.answer import Plan
from sft.plan.communicators import communicators
from sft.plan.gpus import GB
from sft.plan.memory import kept_of
from sft.plan.stage_weights import stage_weights
from sft.plan.words import rounded, span


def explain(plan: Plan) -> list[str]:
    """Lines of text, in the order of the page."""
    return [*_sizes(plan), "", *_memory(plan), "", *_time(plan)]


def _sizes(plan: Plan) -> list[str]:
    model = plan.model
    linears = " + ".join(f"{linear.name} {linear.inputs:,} x {linear.outputs:,}" for linear in model.linears)
    own = 0 if model.is_tied else model.head_weights
    return [
        "parameters (of config.json)",
        f"  a layer = {linears}; with biases and norms {model.layer_weights:,}",
        f"  all = {model.layers} layers x {model.layer_weights:,} + embedding {model.embedding_weights:,} "
        f"+ final norm {model.final_weights:,} + head {own:,}{' (tied)' if model.is_tied else ''} = "
        f"{model.num_parameters:,}",
    ]


def _memory(plan: Plan) -> list[str]:
    choice, question, model = plan.choice, plan.question, plan.model
    peak, work, layout = choice.peak, choice.work, choice.layout
    layers = choice.ranges[peak.stage]
    weights = stage_weights(model, layout, peak.stage, layers, question.adapters)
    kept = kept_of(model, layout, work)
    in_flight = min(layout.pp - peak.stage, work.micro_batches)
    each, kind = work.bytes_each, kind_of(work.optimizer, work.momentum)
    masters = "4 master + " if work.dtype == "bf16" else ""
    moments = f"{kind.matrix_bytes:.3g} moments" + (
        f" ({kind.other_bytes:.3g} of embedding and head)" if work.optimizer == "muon" else ""
    )
    gpu, groups = question.gpu, communicators(layout)
    lines = [
        f"memory of a rank of stage {peak.stage}, the fullest, at its peak ({peak.moment}); GB are of 2^30 bytes",
        f"  numbers: {weights.base:,} weights, {weights.trained:,} trained, {weights.quantised:,} quantised",
        f"  weights = {each} bytes x {weights.base - weights.quantised:,} + quantised = {peak.weights / GB:.2f} GB",
        (
            f"  gradients = float32 sums, 4 bytes x {weights.trained:,}, and the one that is being added = "
            f"{peak.gradients / GB:.2f} GB"
        ),
        f"  optimizer = ({masters}{moments}) x {weights.trained:,} / dp {layout.dp} = {peak.optimizer / GB:.2f} GB",
        f"  activations of a layer for {work.row_tokens:,} tokens: none {kept.whole / GB:.3f}, selective "
        f"{kept.products / GB:.3f}, "
        f"full {kept.boundary / GB:.3f} GB",
        f"  in flight = min(pp {layout.pp} - stage {peak.stage}, {work.micro_batches} micro-batches) = {in_flight}; "
        f"x {len(layers)} layers, and one layer's backward pass {kept.backward / GB:.3f} GB: activations = "
        f"{peak.activations / GB:.2f} GB",
    ]
    if peak.logits:
        lines.append(
            f"  logits = {work.trained_tokens:,.0f} trained tokens x {model.vocabulary_on(layout.tp):,} of the "
            "vocabulary, "
            f"in float32 with their gradients = {peak.logits / GB:.2f} GB"
        )
    if peak.buffers:
        what = (
            "small gradients, copied to be sent together"
            if peak.moment == "exchange"
            else f"what {work.optimizer} makes while it updates"
        )
        lines.append(f"  buffers = {what} = {peak.buffers / GB:.2f} GB")
    lines.append(
        f"  not for tensors = {gpu.reserved_gb:g} GB of CUDA + {gpu.spare:.0%} of {gpu.memory_gb:g} GB that stay free "
        f"+ {groups} "
        f"communicator{'s' * (groups > 1)} x {gpu.communicator_gb:g} GB = {gpu.withheld_gb(groups):.2f} GB"
    )
    lines.append(f"  total = {peak.total / GB:.2f} GB of {choice.usable_bytes / GB:.2f} GB")
    return lines


def _time(plan: Plan) -> list[str]:
    choice, gpu, model = plan.choice, plan.question.gpu, plan.model
    seconds, rows, layout = choice.seconds, choice.rows, choice.layout
    tflops = gpu.bf16_tflops if plan.question.dtype == "bf16" else gpu.fp32_tflops
    per_token = model.layers * sum(2 * linear.inputs * linear.outputs for linear in model.linears)
    return [
        (
            f"time of an iteration: {rows.micro_batches} micro-batches of {rows.row_tokens:,.0f} tokens on each of "
            f"{layout.dp} replicas"
        ),
        f"  rates: products {tflops:g} TFLOP/s x {gpu.matrix_efficiency:g}, memory {gpu.memory_gbps:g} GB/s x "
        f"{gpu.memory_efficiency:g}, "
        f"links {gpu.link_gbps:g} GB/s x {gpu.link_efficiency:g}, network {gpu.network_gbps:g} GB/s x "
        f"{gpu.network_efficiency:g}",
        (
            f"  products = {rows.micro_batches} micro-batches x forward, and twice as much backward: "
            f"{span(seconds.products)}"
        ),
        f"  attention over documents of {rows.document_tokens:,.0f} tokens: {span(seconds.attention)}",
        f"  norms, rotations, activations, sums of gradients, at the memory's rate: {span(seconds.memory_bound)}",
        (
            f"  computed again ({choice.recompute}): {span(seconds.recompute)}; head over trained tokens: "
            f"{span(seconds.head)}"
        ),
        (
            f"  tensor-parallel traffic = 4 exchanges a layer of {model.hidden:,} x tokens x 2 (tp - 1) / tp: "
            f"{span(seconds.tensor_traffic)}"
        ),
        f"  waiting = (pp {layout.pp} - 1) x a stage's micro-batch: {span(seconds.bubble)}",
        f"  pipeline traffic = {model.hidden:,} x tokens, to the next stage and back: {span(seconds.pipeline_traffic)}",
        (
            f"  data-parallel traffic = gradients summed, weights gathered, over {layout.dp} replicas: "
            f"{span(seconds.data_traffic)}"
        ),
        f"  optimizer = a rank's share of the states read and written: {span(seconds.optimizer)}",
        f"  total = {span(seconds.total)}",
        f"  MFU = 3 x ({rounded(per_token)} a token in products + attention + head) x {rows.tokens:,.0f} tokens / "
        f"{span(seconds.total)} / "
        f"{layout.world} GPUs / {tflops:g} TFLOP/s = {choice.mfu:.1%}",
    ]
