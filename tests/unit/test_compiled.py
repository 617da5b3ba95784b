"""Compiled layers: how often they are compiled, what they compute, and what happens where they cannot be."""

from __future__ import annotations

import copy
import shutil
from itertools import accumulate

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from sft.model import attention
from sft.model.build import build_stage
from sft.model.collectives import SingleRank
from sft.model.compiled import compile_blocks
from sft.model.lora import LoraSettings, initialise
from sft.objective.compiled import compiled_likelihood
from sft.objective.likelihood import negative_log_likelihood
from tests.models import tiny_config

# Dynamo's and Inductor's own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]
CPU = torch.device("cpu")
TOGETHER = ("llama", "mistral-window", "gemma3", "gpt-neox", "opt", "qwen2", "qwen3", "phi3")
_ADAPTERS = LoraSettings(rank=4, alpha=8.0)
ROWS = ([30, 20, 14], [31, 20, 13], [40, 30], [10, 20, 30, 5], [64], [50], [16] * 4, [7, 8, 9, 10, 11, 12], [33, 20])


def _documents(query, key, value, bounds, window):
    """(slices, query_HTD, key_HTD, value_HTD, probabilities_HTT) of each document. Shapes as torch's kernel has them:
    query_THD, key_TGD, value_TGD.
    """
    for begin, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        q, k, v = (t[begin:end].transpose(0, 1) for t in (query, key, value))
        k, v = (t.repeat_interleave(q.size(0) // t.size(0), 0) for t in (k, v))
        ago = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        seen = (ago >= 0) & ((ago <= window) | (window == -1))
        yield slice(begin, end), q, k, v, torch.softmax((q @ k.transpose(1, 2)).masked_fill(~seen, -torch.inf), -1)


@torch.library.custom_op("sft_tests::varlen", mutates_args={})
def varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int, window: int
) -> torch.Tensor:
    """Stands for the kernel, which a CPU has not."""
    assert longest == int(bounds.diff().max())
    outputs = [weights @ v for _, _, _, v, weights in _documents(query, key, value, bounds, window)]
    return torch.cat(outputs, 1).transpose(0, 1).contiguous()


@varlen.register_fake
def _(query, key, value, bounds, longest, window):
    return torch.empty_like(query)


@torch.library.custom_op("sft_tests::varlen_backward", mutates_args={})
def varlen_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    window: int,
) -> list[torch.Tensor]:
    found = [torch.zeros_like(tensor) for tensor in (query, key, value)]
    for part, q, k, v, weights in _documents(query, key, value, bounds, window):
        seed = gradient[part].transpose(0, 1)
        towards = seed @ v.transpose(1, 2)
        scores = weights * (towards - (towards * weights).sum(-1, keepdim=True))
        for total, own in zip(
            found, (scores @ k, scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ seed), strict=True
        ):
            heads = own.unflatten(0, (total.size(1), -1)).sum(1)
            total[part] = heads.transpose(0, 1)
    return found


@varlen_backward.register_fake
def _(gradient, query, key, value, bounds, window):
    return [torch.empty_like(tensor) for tensor in (query, key, value)]


def _setup(ctx, inputs, output):
    *tensors, _, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _backward(context, gradient):
    return (*varlen_backward(gradient, *context.saved_tensors, context.window), None, None, None)


varlen.register_autograd(_backward, setup_context=_setup)


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """As on a GPU in 16 bits, with heads as small as those of the tiny models."""

    def call(query, key, value, bounds, _, longest, __, *, scale, window_size, **___):
        return varlen(query * (scale or query.size(-1) ** -0.5), key, value, bounds, longest, window_size[0])

    monkeypatch.setattr(attention, "varlen_attn", call)
    monkeypatch.setattr(attention, "_HEAD_STEP", 4)
    monkeypatch.setattr(
        attention, "_bounds_of", lambda lengths, like: torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    )
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _stage(config, recompute="none", lora=None):
    built = build_stage(
        config,
        range(config.num_hidden_layers),
        SingleRank(),
        sequence_parallel=False,
        recompute=recompute,
        dtype=torch.float32,
        device=CPU,
        lora=lora,
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters.values():
            parameter.normal_(0.02, 0.1)
    if lora is not None:
        initialise(built.parameters, built.places, 0)
    return built


def _train(stage, lengths):
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    stage.expect([lengths])
    ids = torch.arange(positions.numel())[None] % 127 + 3
    torch.logsumexp(stage.logits(stage((ids, positions)), torch.arange(positions.numel())), -1).sum().backward()
    return ids


class _Counting:
    """A backend that compiles nothing."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module, example):
        self.graphs += 1
        return module.forward


@pytest.mark.parametrize(
    ("family", "lora"),
    [*((family, None) for family in TOGETHER), ("llama", _ADAPTERS), ("gpt-neox", _ADAPTERS)],
    ids=[*TOGETHER, "llama, adapters", "gpt-neox, adapters"],
)
def test_documents_of_any_number_and_length_share_three_graphs_without_a_break(family, lora):
    built, backend = _stage(tiny_config(family), lora=lora), _Counting()
    assert compile_blocks(built.stage, tiny_config(family), CPU, backend) is None
    for lengths in ROWS:
        _train(built.stage, lengths)
    assert 1 <= backend.graphs <= 3
    assert not counters["graph_break"]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_compiled_layers_give_the_gradients_of_transformers(family, recompute):
    config, lengths = tiny_config(family), [11, 5, 16]
    built = _stage(config, recompute)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(built.parameters[name])
    assert compile_blocks(built.stage, config, CPU, "aot_eager") is None
    ids = _train(built.stage, lengths)
    for document in ids.split(lengths, 1):
        torch.logsumexp(model(input_ids=document, use_cache=False).logits, -1).sum().backward()
    for name, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            built.parameters[name].grad, parameter.grad, rtol=1e-4, atol=1e-4 * scale + 1e-6, msg=name
        )


def test_a_compiler_that_fails_leaves_layers_as_they_were():
    def broken(module, example):
        raise OSError("no C compiler")

    config = tiny_config("llama")
    built = _stage(config)
    run = built.stage.run
    assert "no C compiler" in str(compile_blocks(built.stage, config, CPU, broken))
    assert built.stage.run is run
    _train(built.stage, [5, 3])


def test_a_compilation_that_fails_during_training_does_not_end_it():
    class FailsLater(_Counting):
        def __call__(self, module, example):
            if self.graphs == 1:
                raise OSError("the disk is full")
            return super().__call__(module, example)

    config, said = tiny_config("llama"), []
    built, written = _stage(config), _stage(config)
    assert compile_blocks(built.stage, config, CPU, FailsLater(), said.append) is None
    for one in (built, written):
        with torch.no_grad():  # which needs another graph
            one.stage.expect([[5, 3]])
            one.stage((torch.arange(8)[None] + 3, torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])))
        _train(one.stage, [5, 3])
    assert len(said) == 1
    assert said[0].startswith("layers are not compiled any more, which is slower: BackendCompilerFailed: ")
    assert "the disk is full" in said[0]
    for name, parameter in written.parameters.items():
        torch.testing.assert_close(built.parameters[name].grad, parameter.grad, msg=name)


def test_every_kind_of_layer_is_tried_before_training():
    config, backend = tiny_config("gemma3"), _Counting()
    built = _stage(config)
    assert compile_blocks(built.stage, config, CPU, backend) is None
    tried = backend.graphs
    assert tried == 2  # with a window and without
    _train(built.stage, [30, 20])
    assert backend.graphs == tried


def test_a_compiler_that_computes_something_else_is_not_used():
    def wrong(module, example):
        return lambda *inputs: [output * 1.2 for output in module.forward(*inputs)]

    config = tiny_config("llama")
    built = _stage(config)
    run = built.stage.run
    assert "compiled layers compute other values, off by 2.0e-01" in str(
        compile_blocks(built.stage, config, CPU, wrong)
    )
    assert built.stage.run is run


@pytest.mark.parametrize("family", ["gemma2", "falcon"])
def test_attention_document_by_document_is_not_compiled(family):
    config = tiny_config(family)
    reason = compile_blocks(_stage(config).stage, config, CPU, _Counting())
    assert "documents one by one" in str(reason)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="Inductor needs a C++ compiler on a CPU")
def test_inductor_computes_what_is_written():
    config = tiny_config("llama")
    built, written = _stage(config), _stage(config)
    assert compile_blocks(built.stage, config, CPU) is None
    for lengths in ([30, 20, 14], [11, 7]):
        _train(built.stage, lengths)
        _train(written.stage, lengths)
    for name, parameter in written.parameters.items():
        torch.testing.assert_close(built.parameters[name].grad, parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_loss_is_that_of_torch(dtype):
    likelihood, reason = compiled_likelihood(131, dtype, CPU, "aot_eager")
    assert reason is None
    torch.manual_seed(0)
    logits, targets = torch.randn(40, 131).to(dtype).requires_grad_(), torch.randint(0, 131, (40,))
    found = likelihood(logits, targets, 131, SingleRank())
    expected = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(one.sum(), logits)[0] for one in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_a_loss_that_cannot_be_compiled_is_computed_as_it_was_written():
    def broken(module, example):
        raise OSError("no C compiler")

    likelihood, reason = compiled_likelihood(131, torch.float32, CPU, broken)
    assert likelihood is negative_log_likelihood
    assert "no C compiler" in str(reason)
