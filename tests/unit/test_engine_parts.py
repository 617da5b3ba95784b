"""The loss over a split vocabulary, stages with and without recomputation, stages on meta."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from sft.engine.loss import MicroBatchLoss
from sft.model import build
from sft.model.build import build_stage, make_on_meta, without_dropout
from sft.model.collectives import SingleRank
from sft.model.gradients import sum_partial
from sft.model.slices import Slice
from sft.model.tensor_parallel import ParameterShard
from sft.objective.cross_entropy import CrossEntropy
from sft.objective.likelihood import most_likely, negative_log_likelihood
from tests.models import FAMILIES, tiny_config
from tests.threads import run_together
from tokenize_data.errors import UserError

CPU = torch.device("cpu")
VOCABULARY = 131  # no number of ranks divides it


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tensors are tiny: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_and_its_gradient_are_those_of_cross_entropy(size, dtype):
    torch.manual_seed(0)
    whole = (torch.randn(9, VOCABULARY) * 8).to(dtype)
    targets, weights = torch.randint(0, VOCABULARY, (9,)), torch.rand(9)
    targets[:2] = torch.tensor([0, VOCABULARY - 1])
    expected = whole.float().clone().requires_grad_()
    losses = functional.cross_entropy(expected, targets, reduction="none")
    (losses * weights).sum().backward()

    def on_a_rank(group):
        rows = -(-VOCABULARY // size)
        padded = functional.pad(
            whole, (0, rows * size - VOCABULARY), value=50.0
        )  # what stands in the padding is not seen
        mine = padded[:, group.rank * rows : (group.rank + 1) * rows].clone().requires_grad_()
        nll = negative_log_likelihood(mine, targets, VOCABULARY, group)
        (nll * weights).sum().backward()
        return nll.detach(), mine.grad

    results = run_together(size, on_a_rank)
    gradient = torch.cat([gradient for _, gradient in results], 1)
    for nll, _ in results:
        assert nll.dtype is torch.float32
        torch.testing.assert_close(nll, losses.detach())
    exactness = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 8e-3, "atol": 1e-5}
    torch.testing.assert_close(gradient[:, :VOCABULARY].float(), expected.grad, **exactness)
    assert not gradient[:, VOCABULARY:].any()


def test_no_tokens_at_all():
    for size in (1, 2):
        nll = run_together(
            size, lambda group: negative_log_likelihood(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 4, group)
        )
        assert all(tuple(one.shape) == (0,) for one in nll)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_most_likely_token_is_the_first_of_the_largest(size):
    torch.manual_seed(0)
    whole = torch.randn(6, VOCABULARY)
    whole[0, [3, 70, 130]] = 9.0
    whole[1, [70, 130]] = 9.0
    whole[2, 130] = 9.0
    rows = -(-VOCABULARY // size)
    padded = functional.pad(whole, (0, rows * size - VOCABULARY), value=50.0)
    results = run_together(
        size,
        lambda group: most_likely(padded[:, group.rank * rows : (group.rank + 1) * rows].clone(), VOCABULARY, group),
    )
    for ids in results:
        assert ids.tolist() == whole.argmax(-1).tolist()
        assert ids[:3].tolist() == [3, 70, 130]


def test_partial_gradients_are_summed_and_replicas_of_a_part_only_among_themselves():
    """Four ranks, two key-value heads: ranks 0 and 1 share the first half, 2 and 3 the second."""

    def on_a_rank(group):
        half = group.rank // 2
        part = Slice(dim=0, pieces=((half * 2, half * 2 + 2),), is_owner=group.rank % 2 == 0)
        places = {
            "norm": ParameterShard((3,), None, True),
            "whole": ParameterShard((3,)),
            "own": ParameterShard((8, 3), Slice(dim=0, pieces=((0, 2),))),
            "shared": ParameterShard((4, 3), part, True),
        }
        gradients = {
            name: torch.full(part.shape_of(place.shape) if name in ("own", "shared") else (3,), float(10**group.rank))
            for name, place in places.items()
        }
        sum_partial(gradients, places, group)
        return {name: sorted(set(gradient.flatten().tolist())) for name, gradient in gradients.items()}

    for rank, found in enumerate(run_together(4, on_a_rank)):
        assert found == {
            "norm": [1111.0],
            "whole": [10.0**rank],
            "own": [10.0**rank],
            "shared": [11.0 if rank < 2 else 1100.0],
        }


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputation_changes_no_gradient(family):
    def gradients(recompute):
        stage = _stage(family, recompute)
        ids, positions = torch.arange(3, 33)[None], torch.cat([torch.arange(12), torch.arange(18)])[None]
        labels = (torch.arange(30), torch.arange(4, 34), torch.ones(30), torch.zeros(30), torch.ones(1))
        MicroBatchLoss(CrossEntropy(), stage.stage, VOCABULARY, SingleRank(), 4096)(
            stage.stage((ids, positions)), labels
        ).backward()
        return {name: parameter.grad for name, parameter in stage.parameters.items()}

    kept = gradients("none")
    for recompute in ("selective", "full"):
        for name, gradient in gradients(recompute).items():
            torch.testing.assert_close(gradient, kept[name], rtol=1e-6, atol=1e-7, msg=f"{recompute}: {name}")


def test_parameters_on_meta_take_no_memory_and_buffers_are_real():
    model = make_on_meta(tiny_config("gemma3"), torch.bfloat16)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    buffers = dict(model.named_buffers())
    assert buffers
    for name, buffer in buffers.items():
        assert buffer.device.type == "cpu", name
    assert all(buffer.dtype is torch.float32 for name, buffer in buffers.items() if "inv_freq" in name)


def test_a_stage_holds_its_own_parameters_only():
    whole = {name for name, _ in make_on_meta(tiny_config("llama"), torch.float32).named_parameters()}
    first, last = (_stage("llama", "none", layers).parameters for layers in (range(3), range(3, 4)))
    assert first.keys().isdisjoint(last)
    assert first.keys() | last.keys() == whole
    assert "model.embed_tokens.weight" in first
    assert {"lm_head.weight", "model.norm.weight"} <= last.keys()


@pytest.mark.parametrize("family", ["llama3-tied", "gemma", "opt", "falcon"])
def test_a_tied_parameter_is_one_object_in_a_stage_and_on_both_ends_of_several(family):
    built = _stage(family, "none")
    embedding, head = built.stage.embedding.trunk.get_input_embeddings(), built.stage.head.head
    assert head.weight is embedding.weight is built.parameters[built.tied_name]
    for layers in (range(2), range(2, 4)):
        assert built.tied_name in _stage(family, "none", layers).parameters
    assert _stage("llama", "none").tied_name is None


def test_dropout_is_off_whatever_the_configuration_says():
    config = tiny_config("opt")
    config.dropout = config.attention_dropout = config.layerdrop = 0.4
    without = without_dropout(config)
    assert (without.dropout, without.attention_dropout, without.layerdrop, without.use_cache) == (0.0, 0.0, 0.0, False)
    assert config.dropout == 0.4
    stage = build_stage(
        config, range(4), SingleRank(), sequence_parallel=False, recompute="none", dtype=torch.float32, device=CPU
    ).stage.train()
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.normal_(std=0.1)
        inputs = (torch.arange(3, 13)[None], torch.arange(10)[None])
        assert torch.equal(stage(inputs), stage(inputs))


def test_what_is_no_causal_model_is_refused_by_name():
    from transformers import CLIPConfig

    with pytest.raises(
        UserError,
        match=r"^clip is not a causal language model that transformers knows \(.+\): it cannot be trained here$",
    ):
        build.make_on_meta(CLIPConfig(), torch.float32)


def _stage(family, recompute, layers=range(4)):
    built = build_stage(
        tiny_config(family),
        layers,
        SingleRank(),
        sequence_parallel=False,
        recompute=recompute,
        dtype=torch.float32,
        device=CPU,
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters.values():
            parameter.normal_(mean=0.02, std=0.1)
    return built


def test_projections_beside_the_layers_are_outside_of_them():
    """For Muon, which takes the matrices inside the layers alone."""
    from types import SimpleNamespace

    from sft.engine.pipeline import _trained

    processes: Any = SimpleNamespace(is_first_stage=True)
    outside = set(_trained(_stage("opt-350m", "none"), processes).outside)
    trunk = "model.decoder"
    assert {f"{trunk}.project_in.weight", f"{trunk}.project_out.weight", f"{trunk}.embed_tokens.weight"} <= outside
    assert not any(".layers." in name for name in outside)
