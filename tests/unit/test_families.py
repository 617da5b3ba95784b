"""A family is one file that registers itself: what it says is what the planner, the tensor-parallel split, packed rows
and the check before training use.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPTJConfig, GPTJForCausalLM

import sft.families
from sft.families import table
from sft.families.architecture import Architecture
from sft.families.family import Family
from sft.model.build import build_stage, make_on_meta
from sft.model.collectives import SingleRank
from sft.model.tensor_parallel import layer_plan
from sft.plan.layout import Layout
from sft.plan.stage_weights import stage_weights
from sft.verify.selfcheck import self_check, tiny
from tests.models import tiny_config
from tokenize_data.errors import UserError

FOLDER = Path(sft.families.__file__).parent
FACTS = {"architecture", "counting", "experts", "family", "sizes", "table"}  # files there that are of no family


class MadeUpConfig(GPTJConfig):  # type: ignore[misc]
    model_type = "made_up"


class MadeUp(GPTJForCausalLM):  # type: ignore[misc]
    """GPT-J under another name: attention that knows no documents."""

    config_class = MadeUpConfig


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a model that transformers knows, and no file here; the table is put back afterwards."""
    monkeypatch.setattr(table, "FAMILIES", dict(table.FAMILIES))
    AutoConfig.register("made_up", MadeUpConfig, exist_ok=True)
    AutoModelForCausalLM.register(MadeUpConfig, MadeUp, exist_ok=True)
    return MadeUpConfig(**tiny_config("gpt-j").to_diff_dict() | {"model_type": "made_up"})


def register_made_up(**facts: Any) -> None:
    table.register(replace(table.FAMILIES["gptj"], kind="made_up", **facts))


def test_without_a_file_such_a_family_is_refused(config):
    with pytest.raises(UserError, match=r"MadeUp|made_up"):
        self_check(config, SingleRank(), False)


def test_with_one_it_is_trained(config):
    register_made_up()
    assert self_check(config, SingleRank(), False) <= 1e-5
    self_check(config, SingleRank(), False, dtype=torch.bfloat16)


@pytest.mark.parametrize("tp", [1, 2])
def test_with_one_it_is_planned_as_it_is_built(config, tp):
    register_made_up()
    model = table.architecture_of(json.loads(config.to_json_string(use_diff=False)))
    assert (model.kind, model.is_known) == ("made_up", True)
    built = build_stage(
        config,
        range(4),
        SingleRank(size=tp),
        sequence_parallel=False,
        recompute="none",
        dtype=torch.float32,
        device=torch.device("meta"),
    )
    found = sum(parameter.numel() for parameter in built.parameters.values())
    assert stage_weights(model, Layout(tp=tp), 0, range(4), None).base == found


def test_what_it_says_is_what_is_used(config):
    def count(config: Mapping[str, Any]) -> Architecture:
        return replace(table.FAMILIES["gptj"].count(config), layers=99)

    register_made_up(
        count=count,
        tensor_plan=lambda config: {"attn.q_proj": "colwise"},
        small_sizes=lambda config, hidden: {"n_embd": hidden, "rotary_dim": 2},
    )
    assert table.architecture_of(config.to_dict()).layers == 99
    assert layer_plan(config) == {"attn.q_proj": "colwise"}
    assert tiny(config).rotary_dim == 2


def test_a_family_without_a_file_is_counted_like_llama():
    config = tiny_config("llama").to_dict()
    like = table.architecture_of({**config, "model_type": "unheard_of"})
    assert replace(like, kind="llama", is_known=True) == table.architecture_of(config)
    assert table.family_of("unheard_of").tensor_plan(None) is None


def test_each_file_is_one_line_of_the_table():
    files = {path.stem for path in FOLDER.glob("*.py")} - FACTS - {"__init__"}
    assert files == {name for name, value in vars(sft.families).items() if inspect.ismodule(value)} - FACTS
    assert all(isinstance(family, Family) and family.kind == kind for kind, family in table.FAMILIES.items())


def test_each_family_has_a_small_configuration_that_tests_run():
    without = {kind for kind, family in table.FAMILIES.items() if not family.variants}
    assert without == {"gemma3"}  # with pictures: its text part is gemma3_text


def test_tables_of_positions_are_not_rounded():
    """What they are computed from would be, in bfloat16; transformers' from_pretrained computes them in float32."""
    tables = [
        make_on_meta(tiny_config("gpt-j"), dtype).transformer.h[0].attn.embed_positions
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert torch.equal(*tables)
