"""A model taken apart gives transformers' logits, gradients too, for every family; what is not understood is refused by
name.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from sft.model import attention, parts
from sft.model.anatomy import find_anatomy
from sft.model.collectives import SingleRank
from sft.model.parts import Parts, block_diagonal_mask, lengths_of, take_apart
from sft.verify.selfcheck import self_check
from tests.models import FAMILIES, tiny_config
from tokenize_data.errors import UserError

LENGTHS = (9, 4, 14)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tensors are tiny: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_give_transformers_logits_on_a_packed_row(name):
    assert self_check(tiny_config(name), SingleRank(), False) <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_they_do_in_bfloat16_within_what_rounding_explains(name):
    self_check(tiny_config(name), SingleRank(), False, dtype=torch.bfloat16)


def test_a_mistake_in_bfloat16_alone_is_found(monkeypatch):
    right = attention._one_document

    def wrong(query, *arguments):
        output = right(query, *arguments)
        return output * 1.5 if query.dtype is torch.bfloat16 else output

    monkeypatch.setattr(attention, "_one_document", wrong)
    assert self_check(tiny_config("llama"), SingleRank(), False) <= 1e-5
    message = (
        r"llama split into stages does not compute what transformers computes in bfloat16 \(.+: off by "
        r"\d+\.\d times what rounding"
    )
    with pytest.raises(UserError, match=message):
        self_check(tiny_config("llama"), SingleRank(), False, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_those_of_separate_documents(name):
    torch.manual_seed(1)
    theirs = AutoModelForCausalLM.from_config(tiny_config(name), attn_implementation="eager", dtype=torch.float32)
    ours = copy.deepcopy(theirs)
    anatomy = find_anatomy(ours)
    names = {id(parameter): key for key, parameter in ours.named_parameters()}
    ours.set_attn_implementation(attention.NAME)
    apart = take_apart(ours, anatomy)
    documents = [torch.randint(3, theirs.config.vocab_size, (1, length)) for length in LENGTHS]
    for ids in documents:
        torch.logsumexp(theirs(input_ids=ids, use_cache=False).logits, -1).sum().backward()
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    hidden = apart.embedding(torch.cat(documents, 1), positions)
    row = apart.rotary(positions, hidden, LENGTHS)
    assert row.documents.lengths == LENGTHS
    for block in apart.blocks:
        hidden = block(hidden, row)
    torch.logsumexp(apart.head(hidden), -1).sum().backward()
    found = {names[id(p)]: p.grad for module in _modules(apart) for p in module.parameters()}
    expected = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(
            found[key], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()) + 1e-6, msg=key
        )


def test_every_parameter_belongs_to_exactly_one_part():
    for name in FAMILIES:
        model = AutoModelForCausalLM.from_config(tiny_config(name))
        expected = {id(parameter) for parameter in model.parameters()}
        tied = {id(model.get_output_embeddings().weight)} if model.config.tie_word_embeddings else set()
        apart = take_apart(model, find_anatomy(model))
        owners = [id(p) for module in _modules(apart) for p in module.parameters()]
        assert set(owners) == expected
        assert len(owners) == len(expected) + len(tied), name


def test_anatomy_on_the_meta_device_needs_no_memory():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    anatomy = find_anatomy(model)
    assert (anatomy.trunk, anatomy.layers, anatomy.embedding, anatomy.final, anatomy.head, anatomy.num_layers) == (
        "model",
        "model.layers",
        "model.embed_tokens",
        ("model.norm",),
        "lm_head",
        4,
    )


def test_a_mistake_is_found_by_the_self_check(monkeypatch):
    right = parts.Head.logits
    monkeypatch.setattr(parts.Head, "logits", lambda self, hidden: right(self, hidden) * 1.001)
    with pytest.raises(
        UserError, match=r"llama split into stages does not compute what transformers computes \(.+: off by "
    ):
        self_check(tiny_config("llama"), SingleRank(), False)


def test_rotary_embeddings_stay_in_float32_when_the_model_is_cast():
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    rotary = take_apart(model, find_anatomy(model)).rotary.to(torch.bfloat16)
    positions = torch.arange(300)[None]
    cosines, sines = rotary(positions, torch.zeros(1, 300, 48), [300]).rotations[None]
    expected = positions[0, :, None] / 10000.0 ** (torch.arange(0, 12, 2) / 12)
    torch.testing.assert_close(cosines[0, :, :6], expected.cos(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sines[0, :, :6], expected.sin(), rtol=1e-4, atol=1e-4)


def test_alibi_is_refused_by_name():
    config = tiny_config("falcon")
    config.alibi = True
    with pytest.raises(UserError, match="FalconForCausalLM with alibi"):
        find_anatomy(AutoModelForCausalLM.from_config(config))


def test_unknown_attention_features_are_refused():
    tensors = [torch.zeros(1, 2, 3, 4)] * 3
    call = partial(
        attention.packed_attention,
        torch.nn.Identity(),
        *tensors,
        None,
        documents=attention.documents_of([3], tensors[0]),
    )
    with pytest.raises(NotImplementedError, match="s_aux"):
        call(s_aux=torch.zeros(1))
    for name, value in (("position_bias", torch.zeros(1)), ("is_causal", False)):
        with pytest.raises(NotImplementedError, match=name):
            call(**{name: value})
    with pytest.raises(NotImplementedError, match="dropout"):
        call(dropout=0.1)


def _varlen(query, key, value, bounds, _, longest, __, *, scale, window_size, enable_gqa=False):
    """What torch documents of its kernel, which runs on GPUs alone."""
    assert longest == bounds.diff().max()
    assert window_size[1] == 0
    outputs = []
    for begin, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        q, k, v = (t[begin:end].transpose(0, 1) for t in (query, key, value))
        ago = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        seen = (ago >= 0) & ((ago <= window_size[0]) | (window_size[0] == -1))
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=scale, enable_gqa=q.size(0) != k.size(0)
            )
        )
    return torch.cat(outputs, 1).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 3, 64])
@pytest.mark.parametrize("groups", [2, 4])
def test_all_documents_at_once_are_as_one_by_one(window, groups, monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", _varlen)
    lengths = [5, 1, 9]
    tensors = [torch.randn(1, heads, 15, 8) for heads in (4, groups, groups)]
    options = {"sliding_window": window, "scaling": 0.2}
    documents = attention.documents_of(lengths, tensors[0])
    expected, _ = attention.packed_attention(torch.nn.Identity(), *tensors, None, documents=documents, **options)
    documents = replace(documents, bounds=torch.tensor([0, 5, 6, 15], dtype=torch.int32))
    together, _ = attention.packed_attention(torch.nn.Identity(), *tensors, None, documents=documents, **options)
    torch.testing.assert_close(together, expected)


def test_torch_s_attention_over_all_documents_takes_what_is_given_to_it():
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    assert {"scale", "window_size"} <= set(names)
    assert list(names)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]


def test_block_diagonal_mask():
    mask = block_diagonal_mask([2, 1], torch.zeros(1))[0, 0]
    assert (mask == 0).tolist() == [[True, False, False], [True, True, False], [False, False, True]]


def test_lengths_of_positions():
    assert lengths_of(torch.tensor([[0, 1, 2, 0, 0, 1]])) == [3, 1, 2]


def _modules(apart: Parts) -> list[torch.nn.Module]:
    return [apart.embedding, apart.rotary, *apart.blocks, apart.head]
