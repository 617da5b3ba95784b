"""Adapters: which layers get one, how they begin, what is dropped, what a quantised weight takes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sft.checkpoint import stage_adapters
from sft.config.settings import Settings
from sft.model.build import build_stage
from sft.model.collectives import SingleRank
from sft.model.dropout import AdapterDropout, Keys, decoded, document_keys
from sft.model.linear import Linear
from sft.model.lora import LoraSettings, initial, is_adapter
from sft.model.quantized import QuantizedWeight
from sft.model.slices import Slice
from sft.resolve import adapters
from sft.spec.base import BaseModel
from tests.models import tiny_config
from tests.quantisation import of_bits
from tokenize_data.errors import UserError


def build(family: str = "llama", bits: int | None = None, tied: bool | None = None, **settings):
    config = tiny_config(family)
    if tied is not None:
        config.tie_word_embeddings = tied
    lora = LoraSettings(**{"rank": 4, "alpha": 8.0, **settings})
    return build_stage(
        config,
        range(config.num_hidden_layers),
        SingleRank(),
        sequence_parallel=False,
        recompute="none",
        dtype=torch.float32,
        device=torch.device("cpu"),
        lora=lora,
        quantisation=of_bits(bits),
    )


def trained(built) -> list[str]:
    return [name for name, parameter in built.parameters.items() if parameter.requires_grad]


def test_all_linear_layers_but_the_head_get_adapters_and_nothing_else_is_trained():
    built = build()
    assert built.adapted is not None
    assert len(built.adapted.modules) == 4 * 7
    assert not any("lm_head" in name for name in built.adapted.modules)
    assert all(is_adapter(name) for name in trained(built))
    assert len(trained(built)) == 2 * 4 * 7


def test_names_choose_layers_by_their_ends():
    assert trained(build(targets=("layers.1.self_attn.q_proj",))) == [
        f"model.layers.1.self_attn.q_proj.lora_{letter}.weight" for letter in "AB"
    ]
    assert "lm_head.lora_B.weight" in trained(build(targets=("lm_head",)))


def test_modules_are_trained_in_full_besides():
    assert [name for name in trained(build(modules_to_save=("embed_tokens", "norm"))) if not is_adapter(name)] == [
        "model.embed_tokens.weight",
        "model.norm.weight",
    ]
    tied = build("llama3-tied", modules_to_save=("lm_head",))
    assert tied.adapted is not None
    assert tied.adapted.saved == ("model.embed_tokens", "lm_head")


@pytest.mark.parametrize(
    ("settings", "family", "message"),
    [
        (
            {"targets": ("query",)},
            "llama",
            "--lora_targets query: no layer matches; linear layers are q_proj, k_proj, v_proj, o_proj",
        ),
        (
            {"targets": ("embed_tokens",)},
            "llama",
            "is not a linear layer; to train it in full, use --lora_modules_to_save embed_tokens",
        ),
        ({"targets": ("lm_head",)}, "llama3-tied", "use --lora_modules_to_save lm_head"),
        (
            {"modules_to_save": ("heads",)},
            "llama",
            "--lora_modules_to_save heads: no module matches; there are embed_tokens, q_proj",
        ),
        ({"modules_to_save": ("q_proj",)}, "llama", "would have an adapter and be trained in full"),
    ],
)
def test_what_matches_nothing_is_refused_with_what_there_is(settings, family, message):
    with pytest.raises(UserError) as caught:
        build(family, **settings)
    assert message in str(caught.value)


def test_a_tied_head_with_a_bias_is_not_trained_beside_adapters():
    with pytest.raises(UserError, match="this model's head is its embedding plus a bias, and PEFT drops that bias"):
        build("gpt-j", tied=True, modules_to_save=("lm_head",))


def test_adapters_begin_the_same_everywhere_and_add_nothing():
    name = "model.layers.0.mlp.up_proj.lora_A.weight"
    first = initial(name, (4, 48), 1)
    assert torch.equal(first, initial(name, (4, 48), 1))
    assert not torch.equal(first, initial(name, (4, 48), 2))
    assert not torch.equal(first, initial(name.replace("0", "1"), (4, 48), 1))
    assert first.abs().max() <= 48**-0.5
    assert not initial(name.replace("lora_A", "lora_B"), (96, 4), 1).any()


def test_new_tokens_need_an_embedding_that_is_trained():
    stage_adapters.check_vocabulary(build(), 131, 131)
    stage_adapters.check_vocabulary(build(modules_to_save=("embed_tokens", "lm_head")), 131, 133)
    with pytest.raises(
        UserError,
        match=r"has 2 tokens that the base model lacks, .* add --lora_modules_to_save lm_head model.embed_tokens",
    ):
        stage_adapters.check_vocabulary(build(modules_to_save=("lm_head",)), 131, 133)


def test_an_adapter_to_begin_with_says_rank_scale_and_base(tmp_path: Path):
    content = {"peft_type": "LORA", "r": 6, "lora_alpha": 9, "use_rslora": True, "base_model_name_or_path": "me/model"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    settings = adapters.with_adapter(Settings.of(run_name="r", adapter=str(tmp_path)))
    assert (settings.adapters.lora, settings.adapters.lora_alpha, settings.adapters.lora_rslora) == (6, 9.0, True)
    with pytest.raises(UserError, match=r"--lora 8 with --adapter .*, which has 6: leave --lora out"):
        adapters.with_adapter(Settings.of(run_name="r", adapter=str(tmp_path), lora=8))
    (tmp_path / "adapter_config.json").write_text(json.dumps(content | {"rank_pattern": {"q_proj": 2}}))
    with pytest.raises(UserError, match="adapters of several ranks or scales: merge it"):
        adapters.with_adapter(Settings.of(run_name="r", adapter=str(tmp_path)))
    (tmp_path / "training.json").write_text(json.dumps({"base": "me/model", "base_fingerprint": "a" * 64}))
    entry: Any = SimpleNamespace(path="me/model")
    base = BaseModel(entry=entry, folder=tmp_path, config={}, num_parameters=1, is_entry=False, fingerprint="b" * 64)
    with pytest.raises(
        UserError, match=r"was trained on me/model .fingerprint aaaaaaaaaaaa.*use that base, or begin without --adapter"
    ):
        adapters.check_base(settings, base)
    adapters.check_base(settings, replace(base, fingerprint="a" * 64))


def test_a_stage_without_anything_to_train_gets_something_that_changes_nothing():
    config = tiny_config("llama")
    settings = LoraSettings(rank=4, alpha=8.0, targets=("lm_head",), modules_to_save=("model.norm",))
    built = build_stage(
        config,
        range(2),
        SingleRank(),
        sequence_parallel=False,
        recompute="none",
        dtype=torch.float32,
        device=torch.device("cpu"),
        lora=settings,
    )
    assert trained(built) == []
    assert [parameter.dim() for parameter in built.stage.spare] == [1]
    with torch.no_grad():
        for parameter in built.parameters.values():
            parameter.normal_(std=0.1)
    hidden, _ = built.stage((torch.arange(5)[None], torch.arange(5)[None]))
    hidden.sum().backward()
    assert [float(parameter.grad.sum()) for parameter in built.stage.spare] == [0.0]


@pytest.mark.parametrize(("bits", "most_bytes", "error"), [(4, 0.55, 0.2), (8, 1.1, 0.01)])
def test_a_quantised_weight_is_small_and_near(bits, most_bytes, error):
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    quantized = QuantizedWeight(of_bits(bits), (256, 512), torch.float32, torch.device("cpu"))
    quantized.fill(weight)
    assert quantized.num_bytes <= most_bytes * weight.numel()
    assert float((quantized.whole() - weight).square().mean().sqrt()) < error
    hidden = torch.randn(3, 512, requires_grad=True)
    quantized.product(hidden).sum().backward()
    torch.testing.assert_close(hidden.grad, quantized.whole().sum(0).expand(3, -1), rtol=1e-5, atol=1e-4)


def test_four_bits_of_rows_that_are_no_whole_blocks():
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(0))
    quantized = QuantizedWeight(of_bits(4), (24, 48), torch.float32, torch.device("cpu"))
    quantized.fill(weight)
    assert float((quantized.whole() - weight).abs().max()) < 0.16 * float(weight.abs().max())


def test_frozen_linear_weights_are_no_parameters_when_they_are_quantised():
    built = build(bits=8, modules_to_save=("layers.0.mlp.up_proj",), targets=("q_proj",))
    assert "model.layers.0.mlp.up_proj.weight" in built.parameters
    assert "model.layers.1.mlp.up_proj.weight" in built.quantized
    assert "lm_head.weight" in built.parameters
    assert not built.quantized.keys() & built.parameters.keys()


def test_gradients_of_a_layer_with_an_adapter():
    generator = torch.Generator().manual_seed(0)
    weight, bias, a, b, hidden = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((5, 7), (5,), (3, 7), (5, 3), (2, 4, 7))
    )
    layer = Linear(nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False))
    layer.add_adapter(nn.Parameter(a), nn.Parameter(b), 0.5)
    inputs = (hidden.requires_grad_(), layer.lora_A.weight, layer.lora_B.weight)
    assert torch.autograd.gradcheck(lambda *_: layer(hidden), inputs)
    torch.testing.assert_close(layer(hidden), hidden @ (weight + 0.5 * b @ a).t() + bias)
    with torch.no_grad():
        assert layer(hidden).shape == (2, 4, 5)


def test_what_is_dropped_depends_on_document_and_place_alone():
    key, other = document_keys(b"batch", 2)
    assert document_keys(b"another", 2) != [key, other]
    keys = Keys()
    whole = AdapterDropout(keys, "q_proj", 0.25, 64, None, (0, 1))
    part = AdapterDropout(keys, "q_proj", 0.25, 64, Slice(dim=1, pieces=((32, 64),)), (1, 2))
    packed = torch.cat([torch.arange(200) + (one << 32) for one in (key, other)])[None]
    positions, keys.current_T = decoded(packed)
    assert positions[0].tolist() == [*range(200), *range(200)]
    both = _dropped(whole, 400)
    assert both.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float((both == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert torch.equal(_dropped(part, 400, 32), both[:, 32:])
    assert torch.equal(_dropped(AdapterDropout(keys, "q_proj", 0.25, 64, None, (1, 2)), 200), both[200:])  # a stretch
    _, keys.current_T = decoded(packed[:, 200:])
    assert torch.equal(_dropped(whole, 200), both[200:])
    assert not torch.equal(_dropped(AdapterDropout(keys, "k_proj", 0.25, 64, None, (0, 1)), 200), both[200:])


def test_what_is_dropped_is_dropped_backward_too_and_little_is_there_at_once(monkeypatch):
    torch.manual_seed(0)
    keys = Keys()
    _, keys.current_T = decoded(torch.arange(50)[None] + (7 << 32))
    dropout = AdapterDropout(keys, "q_proj", 0.5, 8, None, (0, 1))
    kept = _dropped(dropout, 50, 8)
    hidden, a = torch.randn(50, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    expected = torch.autograd.grad((hidden * kept @ a.t()).square().sum(), (hidden, a))
    most = []
    right = dropout.in_chunks
    monkeypatch.setattr(
        dropout, "in_chunks", lambda *given: (most.append(chunk[1].numel()) or chunk for chunk in right(*given))
    )
    monkeypatch.setattr("sft.model.dropout._HASHES_AT_ONCE", 64)
    found = torch.autograd.grad(dropout.low(hidden, a).square().sum(), (hidden, a))
    torch.testing.assert_close(found, expected)
    assert max(most) == 64


def test_hashes_are_those_of_whole_numbers():
    """Python's own integers, which never overflow."""

    def hashed(value):
        for factor, shift in ((0x9E3779B1, 15), (0x85EBCA77, 13), (0xC2B2AE3D, 16)):
            value = value * factor & 0xFFFFFFFF
            value ^= value >> shift
        return value

    key, share = 12345, 0.3
    keys = Keys()
    _, keys.current_T = decoded(torch.arange(20)[None] + (key << 32))
    found = _dropped(AdapterDropout(keys, "layer.q_proj", share, 16, None, (0, 1)), 20, 16)
    seed = int.from_bytes(hashlib.sha256(b"layer.q_proj").digest()[:4], "big")
    for token in range(20):
        for feature in range(16):
            value = hashed(hashed(hashed(key) ^ token) ^ hashed(hashed(feature) ^ seed))
            assert bool(found[token, feature]) is (value >= share * 2**32), (token, feature)


def _dropped(dropout, num_tokens, num_features=64):
    return dropout.low(torch.ones(num_tokens, num_features), torch.eye(num_features))
