"""The search: what fits, what is fastest, what is refused with training's words, and the nearest that fits."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.config.quantisation import QUANTISATIONS
from sft.families.table import architecture_of
from sft.optimizer import ownership
from sft.plan import memory
from sft.plan.answer import Data, Plan
from sft.plan.communicators import communicators
from sft.plan.explain import explain
from sft.plan.gpus import GB, TABLE, Gpu, find_gpu
from sft.plan.layout import Layout, ModelShape, choose_layout
from sft.plan.memory import Work, stage_memory
from sft.plan.rows import Batches
from sft.plan.search import Choice, Question, best, evaluate, layout_of, nearest_that_fit, search
from sft.plan.speed import OURS, iteration_seconds
from sft.plan.stage_weights import Adapters, stage_weights
from sft.plan.stages import layer_ranges
from tokenize_data.errors import UserError

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "intermediate_size": 28672,
}


def ask(
    config: dict[str, object] = LLAMA_8B, world: int = 8, gpu: str | Gpu = "h100-80gb", **given: object
) -> Question:
    values: dict[str, object] = {
        "model": architecture_of(config),
        "shape": ModelShape.of_config(config),
        "batches": Batches.all_alike(64, 2047),
        "world": world,
        "seq": 2048,
        "global_batch": 64,
        "trained_share": 0.3,
        "gpu": find_gpu(gpu) if isinstance(gpu, str) else gpu,
    }
    return Question(**(values | given))  # type: ignore[arg-type]


@settings(max_examples=12, deadline=None)
@given(
    world=st.sampled_from([1, 2, 4, 6, 8]),
    memory_gb=st.sampled_from([24.0, 80.0, 141.0]),
    share=st.sampled_from([0.05, 1.0]),
    length=st.integers(60, 2047),
    rank=st.sampled_from([None, 16]),
)
def test_the_search_finds_the_best_of_all(world, memory_gb, share, length, rank):
    gpu = replace(TABLE["h100-80gb"], memory_gb=memory_gb)
    adapters = Adapters(rank=rank, quantisation=QUANTISATIONS["nf4"]) if rank else None
    question = ask(
        world=world, gpu=gpu, trained_share=share, batches=Batches.all_alike(64, length, share), adapters=adapters
    )
    fastest = None
    sizes = range(1, world + 1)
    for tp, pp, micro_batch, recompute in itertools.product(
        sizes, sizes, (1, 2, 4, 8, 16, 32, 64), ("none", "selective", "full")
    ):
        try:
            layout = choose_layout(world, question.shape, tp=tp, pp=pp, sequence_parallel=None, global_batch=64)
            choice = evaluate(question, layout, micro_batch, recompute)
        except UserError:
            continue
        seconds = choice.seconds.total
        if max(stage.total for stage in choice.memory) <= gpu.usable_bytes(communicators(layout)) and (
            fastest is None or seconds < fastest
        ):
            fastest = seconds
    if fastest is None:
        with pytest.raises(UserError, match=r"does not fit: "):
            best(question)
    else:
        assert best(question).seconds.total == fastest


@settings(max_examples=25, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2, 4]),
    dp=st.sampled_from([1, 2, 4]),
    recompute=st.sampled_from(["none", "full"]),
    micro_batch=st.sampled_from([1, 2, 8]),
    dtype=st.sampled_from(["bf16", "fp32"]),
)
def test_more_gpus_never_need_more_memory_each(tp, pp, dp, recompute, micro_batch, dtype):
    """For the same global batch, with the additional ones as replicas; and so the least that is needed anywhere never
    grows.
    """
    question = ask(world=tp * pp * dp, dtype=dtype)
    smaller = evaluate(question, layout_of(question, tp, pp), micro_batch, recompute)
    larger_question = replace(question, world=2 * question.world)
    larger = evaluate(larger_question, layout_of(larger_question, tp, pp), micro_batch, recompute)
    assert larger.peak.total <= smaller.peak.total


def test_the_least_memory_of_any_layout_never_grows_with_gpus():
    least = []
    for world in (1, 2, 4, 8, 16, 32):
        found = search(ask(world=world))
        least.append(min(choice.peak.total for choice in (*found.fitting, *found.too_large)))
    assert least == sorted(least, reverse=True)
    assert least[-1] < least[0] / 8


@settings(max_examples=30, deadline=None)
@given(world=st.integers(1, 24), tp=st.integers(1, 12), pp=st.integers(1, 40), global_batch=st.integers(1, 96))
def test_what_is_refused_is_refused_with_trainings_words(world, tp, pp, global_batch):
    question = ask(
        world=world,
        tp=tp,
        pp=pp,
        global_batch=global_batch,
        batches=Batches.all_alike(global_batch, 100),
        gpu="b200-180gb",
    )
    words = None
    try:
        choose_layout(world, question.shape, tp=tp, pp=pp, sequence_parallel=None, global_batch=global_batch)
    except UserError as error:
        words = str(error)
    if words is None:
        found = search(question)
        assert found.fitting or found.too_large
    else:
        with pytest.raises(UserError) as refused:
            best(question)
        assert str(refused.value) == words


def test_what_does_not_fit_says_what_would_and_that_does():
    question = ask(LLAMA_70B, world=64, tp=8, pp=2, micro_batch=4, recompute="none")
    with pytest.raises(UserError) as refused:
        best(question)
    message = str(refused.value)
    room = r"79\.1 GB \([\d.]+ GB of them for CUDA, NCCL and fragments\)"
    found = re.match(rf"does not fit: ([\d.]+) GB on stage 0 of {room} with (.*); fits with (.*)", message)
    assert found
    assert float(found.group(1)) > 80
    assert found.group(2) == "--tp 8 --pp 2 --micro_batch 4 --recompute none"
    for way in re.split(r", | or ", found.group(3)):
        flags, _, size = way.rpartition(" (")
        changed = dict(zip(*[iter(flags.split())] * 2, strict=True))
        values = {
            name.removeprefix("--"): value if name == "--recompute" else int(value) for name, value in changed.items()
        }
        choice = best(replace(question, **values))  # type: ignore[arg-type]
        assert f"{choice.peak.total / GB:.3g} GB)" == size


def test_where_no_layout_fits_a_larger_machine_is_named():
    with pytest.raises(UserError, match=r"no layout on 4 fits: (8|16|32) GPUs do, with --tp \d+ --pp \d+"):
        best(ask(LLAMA_70B, world=4))
    assert nearest_that_fit(ask(LLAMA_70B, world=4), search(ask(LLAMA_70B, world=4)).too_large[0]) == []


def test_adapters_and_four_bits_make_a_large_model_fit():
    full, lora = (
        search(ask(LLAMA_70B, world=1)),
        search(ask(LLAMA_70B, world=1, adapters=Adapters(rank=16, quantisation=QUANTISATIONS["nf4"]))),
    )
    assert not full.fitting
    assert lora.fitting
    assert lora.fitting[0].peak.weights < 45 * GB


def test_given_settings_stay_as_they_are():
    choice = best(ask(tp=4, pp=2, micro_batch=2, recompute="selective"))
    assert (choice.layout.tp, choice.layout.pp, choice.micro_batch, choice.recompute) == (4, 2, 2, "selective")
    assert all(
        (found.layout.tp, found.layout.dp) == (2, found.layout.world // 2 // found.layout.pp)
        for found in search(ask(tp=2)).fitting
    )


def test_documents_that_make_no_rows_are_refused_by_packings_words():
    question = ask(global_batch=8, batches=Batches.all_alike(8, 4000), micro_batch=1)
    with pytest.raises(
        UserError, match=r"a document of 4,000 tokens is longer than a row of 2,048: raise micro_batch or seq"
    ):
        best(question)


def test_time_does_what_physics_does():
    model = architecture_of(LLAMA_70B)
    gpu = find_gpu("h100-80gb")

    def seconds(tp: int = 1, pp: int = 1, dp: int = 1, **given: object) -> object:
        values: dict[str, object] = {
            "row_tokens": 4096,
            "trained_share": 0.3,
            "micro_batches": 16 // dp,
            "recompute": "none",
        }
        layout = Layout(tp=tp, pp=pp, dp=dp, sequence_parallel=tp > 1)
        return iteration_seconds(model, layout, layer_ranges(80, pp), Work(**(values | given)), gpu, program=OURS)  # type: ignore[arg-type]

    plain = seconds(tp=8)
    assert seconds(tp=8, recompute="full").total > seconds(tp=8, recompute="selective").total > plain.total
    assert seconds(tp=8, pp=2).bubble > 0 == plain.bubble
    assert seconds(tp=8, dp=2).data_traffic > 0 == plain.data_traffic
    assert plain.tensor_traffic > 0 == seconds().tensor_traffic
    assert seconds(tp=16).tensor_traffic > plain.tensor_traffic  # past a node
    assert seconds(tp=8, trained_share=1.0).head > 2 * plain.head
    assert seconds(tp=8, adapters=Adapters(rank=16)).products < plain.products
    assert plain.total == pytest.approx(sum(getattr(plain, part) for part in plain.__dataclass_fields__))


def test_kinds_add_up_and_recomputation_trades_memory():
    model, layout = architecture_of(LLAMA_8B), Layout(tp=2, pp=2, sequence_parallel=True)
    work = Work(row_tokens=8192, trained_share=1.0, micro_batches=8, recompute="none")
    peaks = {
        way: stage_memory(model, layout, 0, range(16), replace(work, recompute=way))
        for way in ("none", "selective", "full")
    }
    assert peaks["none"].total > peaks["selective"].total > peaks["full"].total
    last = stage_memory(model, layout, 1, range(16, 32), work)
    chunked = stage_memory(model, layout, 1, range(16, 32), replace(work, logits_chunk_tokens=1024))
    assert last.moment == "loss"
    assert chunked.logits < last.logits / 4 or chunked.moment != "loss"
    assert chunked.total < last.total


LLAMA_3B = LLAMA_8B | {
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "head_dim": 128,
    "intermediate_size": 8192,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("gpu", ["a100-80gb", "h100-80gb"])
@pytest.mark.parametrize("trained_share", [0.1, 1.0])
def test_full_fine_tuning_of_3b_fits_one_gpu_of_80_gb(gpu, trained_share):
    choice = best(ask(LLAMA_3B, world=1, gpu=gpu, trained_share=trained_share))
    weights = architecture_of(LLAMA_3B).num_parameters
    assert 3.2e9 < weights < 3.3e9
    peak = choice.peak
    assert peak.weights == 2 * weights
    assert peak.optimizer == pytest.approx(12 * weights, rel=0.001)  # masters and two moments in float32
    assert 4 * weights <= peak.gradients <= 4 * weights + 6 * LLAMA_3B["vocab_size"] * LLAMA_3B["hidden_size"]
    # What is left free: CUDA's own, a share for what nobody can use, NCCL.
    assert find_gpu(gpu).memory_gb * GB - peak.total > (1 + 0.03 * 79 + 0.5) * GB


def test_gradients_are_summed_and_sent_in_float32():
    """A reduce-scatter of four bytes for each weight, and an all-gather of two."""
    question = ask(world=8, dtype="bf16")
    choice = evaluate(question, layout_of(question, 1, 1), 1, "none")
    sent = (4 + 2) * architecture_of(LLAMA_8B).num_parameters * 7 / 8
    gpu = question.gpu
    assert choice.seconds.data_traffic == pytest.approx(sent / (gpu.link_gbps * 1e9 * gpu.link_efficiency), rel=0.01)


@pytest.mark.parametrize(
    ("optimizer", "momentum", "each"),
    [("adamw", 0, 12), ("adamw8bit", 0, 6.03), ("adafactor", 0, 4), ("sgd", 0, 4), ("sgd", 0.9, 8), ("muon", 0, 8.5)],
)
def test_every_optimizer_has_its_states(optimizer, momentum, each):
    choice = best(ask(world=8, tp=8, pp=1, optimizer=optimizer, momentum=momentum))
    weights = stage_weights(architecture_of(LLAMA_8B), choice.layout, 0, range(32), None)
    assert choice.peak.optimizer / weights.trained == pytest.approx(each, rel=0.01)
    assert "optimizer = (" in "\n".join(explain(_plan_of(choice, optimizer)))


def test_what_is_bundled_is_what_the_optimizer_bundles():
    assert memory._SMALL_ELEMENTS == ownership._SMALL_ELEMENTS
    assert memory._LEAST_ROWS == ownership._LEAST_ROWS
    assert memory._BUNDLE_ELEMENTS == ownership._BUNDLE_ELEMENTS
    sent = {}
    for optimizer in ("adamw", "adafactor"):  # adafactor's tensors have one owner each, and travel together
        model, layout = architecture_of(LLAMA_8B), Layout(dp=8)
        work = Work(row_tokens=2048, trained_share=1.0, micro_batches=2, recompute="full", optimizer=optimizer)
        sent[optimizer] = memory._bundled(model, layout, range(32), work)
    assert sent["adamw"] == 32 * 2 * 4096  # norms alone
    assert sent["adafactor"] == 4 * 8 * 4096 * 14336


def _plan_of(choice: Choice, optimizer: str) -> Plan:
    question = ask(world=8, tp=8, pp=1, optimizer=optimizer)
    data = Data(documents=None, tokens=None, trained_tokens=None, source="none")
    return Plan(
        name="x",
        model=question.model,
        num_parameters=question.model.num_parameters,
        data=data,
        epochs=None,
        iterations=1,
        question=question,
        choice=choice,
        found=search(question),
    )
