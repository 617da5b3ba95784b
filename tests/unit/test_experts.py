"""Mixture-of-experts models are refused by name: every family of transformers that has experts is recognised by its
configuration.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from safetensors.numpy import save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from sft.cli import entry
from sft.families.experts import has_experts
from tests.unit.test_plan_search import LLAMA_8B

# What in a family's own model code is made of experts: asked of its source, so that the configuration is not its own
# judge.
_EXPERTS = re.compile(r"^class (\w*(?:Experts|SparseMLP|SparseMoeBlock|MoeBlock|MoE))\b", re.MULTILINE)
# Families with experts whose default configuration has none.
_DENSE_BY_DEFAULT = {
    "diffusion_gemma": "num_experts is null",
    "diffusion_gemma_text": "num_experts is null",
    "gemma4": "enable_moe_block is false",
    "gemma4_text": "enable_moe_block is false",
    "doge": "is_moe is false",
    "dots1": "n_routed_experts is null",
    "qwen3_omni_moe_talker_code_predictor": "a dense part of a model with experts",
}


def _source(kind: str) -> str:
    """The model code of a configuration's family, and of the family that its text part is of."""
    inner = ((KINDS[kind] or {}).get("text_config") or {}).get("model_type")
    folders = {CONFIG_MAPPING[name].__module__.split(".")[-2] for name in (kind, inner) if name in CONFIG_MAPPING_NAMES}
    models = Path(transformers.__file__).parent / "models"
    return "\n".join(file.read_text() for folder in folders for file in (models / folder).glob("modeling_*.py"))


def _config(kind: str) -> dict[str, Any] | None:
    try:
        return json.loads(CONFIG_MAPPING[kind]().to_json_string(use_diff=False))  # type: ignore[no-any-return]
    except Exception:  # a few cannot be made without their parts
        return None


KINDS = {kind: _config(kind) for kind in CONFIG_MAPPING_NAMES}
# Whole configurations, and those of a model's text part; parts for other media alone are no language models.
LANGUAGE = {
    kind: config
    for kind, config in KINDS.items()
    if config is not None and not re.search(r"vision|audio|encoder|vitpose", kind)
}


def test_every_family_with_experts_is_recognised():
    with_code = {kind for kind in LANGUAGE if _EXPERTS.search(_source(kind))}
    assert len(with_code) > 60  # of transformers 5.23: 80 or so; far fewer means that this test no longer finds them
    missed = {kind for kind in with_code if not has_experts(LANGUAGE[kind]) and kind not in _DENSE_BY_DEFAULT}
    assert {kind: [key for key in LANGUAGE[kind] if "expert" in key or "moe" in key] for kind in missed} == {}


def test_no_other_family_is_taken_for_one():
    without = {kind for kind in LANGUAGE if not _EXPERTS.search(_source(kind))}
    assert {kind for kind in without if has_experts(LANGUAGE[kind])} == set()
    assert len(without) > 200
    assert not any(has_experts(LANGUAGE[kind]) for kind in _DENSE_BY_DEFAULT if kind in LANGUAGE)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "granitemoehybrid", "num_local_experts": 0}, False),
        ({"model_type": "granitemoehybrid", "num_local_experts": 32}, True),
        ({"model_type": "hunyuan_v1_moe", "num_experts": 1}, True),
        ({"model_type": "vitpose_backbone", "num_experts": 1}, False),
        ({"model_type": "gemma4_text", "enable_moe_block": True, "num_experts": 128}, True),
        ({"model_type": "doge", "is_moe": True, "num_experts": 16384}, True),
        ({"model_type": "ernie4_5_moe_vl", "moe_num_experts": [64, 64]}, True),
        ({"model_type": "x", "text_config": {"num_experts": 8}}, True),
        ({"model_type": "x", "vision_config": {"num_experts": 8}}, False),
        ({"model_type": "x", "num_experts": None}, False),
        ({"model_type": "x", "num_experts": True}, False),
        ({"model_type": "x", "num_experts_per_tok": 2}, False),
    ],
)
def test_facts(config, expected):
    assert has_experts(config) is expected


MIXTRAL = {**LLAMA_8B, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
MESSAGE = "mixtral is a mixture-of-experts model; experts are not supported yet"


@pytest.mark.parametrize("flags", [["--gpu", "h100-80gb", "--nproc_per_node", "8"], ["--lora", "8"]])
def test_plans_refuse_them_by_name(tmp_path, capsys, flags):
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    assert entry(["plan", "--checkpoint", str(tmp_path), "--iters", "5", *flags]) == 2
    error = capsys.readouterr().err
    assert MESSAGE in error
    assert error.count("\n") == 1


def test_training_refuses_them_by_name_before_anything_is_tokenised(bench, tmp_path, capsys):
    base = tmp_path / "base"
    base.mkdir()
    for file in Path(bench.base).iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "config.json").write_text(json.dumps(MIXTRAL))
    save_file({"w": np.zeros((2, 2), np.float32)}, base / "model.safetensors")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "gold": "b"}\n')
    arguments = [
        "--checkpoint",
        base,
        "--run_name",
        "r",
        "--data",
        tmp_path / "rows.jsonl",
        "--tokenized_data_dir",
        tmp_path / "shards",
    ]
    assert entry([str(argument) for argument in arguments]) == 2
    assert MESSAGE in capsys.readouterr().err
    assert not (tmp_path / "shards").exists()
