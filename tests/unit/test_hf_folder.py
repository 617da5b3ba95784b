"""A folder written by several stages is a Hugging Face model with the same logits; publishing is all or nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sft.checkpoint.hf_folder import (
    INDEX,
    SINGLE,
    ShardWriter,
    copy_tokenizer,
    finish,
    publish,
    stop_at_turns,
    write_config,
    write_training,
)
from sft.model.weights import WeightFiles
from tests.models import tiny_config
from tokenize_data.errors import UserError


def written(folder: Path, stages: list[dict[str, torch.Tensor]], limit_bytes: int = 5_000_000_000) -> list[dict]:
    parts = []
    for stage, tensors in enumerate(stages):
        writer = ShardWriter(folder, stage, limit_bytes)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        parts += writer.close()
    return parts


def some(num: int, first: int = 0) -> dict[str, torch.Tensor]:
    return {f"t{n}": torch.full((10, 10), float(n)) for n in range(first, first + num)}


@pytest.mark.parametrize("family", ["llama", "llama3-tied", "gpt-neox", "opt-350m", "gemma3"])
@pytest.mark.parametrize("limit_bytes", [20_000, 5_000_000_000])
def test_two_stages_make_a_folder_that_transformers_reads(tmp_path, family, limit_bytes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        tiny_config(family), attn_implementation="eager", dtype=torch.float32
    ).eval()
    parameters = list(model.named_parameters())
    stages = [dict(parameters[: len(parameters) // 2]), dict(parameters[len(parameters) // 2 :])]
    finish(tmp_path, written(tmp_path, stages, limit_bytes))
    write_config(tmp_path, model.config, model.generation_config, torch.float32, model.config.vocab_size)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert again.dtype == torch.float32
    ids = torch.randint(3, 131, (2, 17))
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not list(tmp_path.glob("part-*"))


def test_one_part_is_a_single_file(tmp_path):
    finish(tmp_path, written(tmp_path, [some(3)]))
    assert [file.name for file in tmp_path.iterdir()] == [SINGLE]
    assert (tmp_path / SINGLE).stat().st_mode & 0o777 == 0o644
    with safe_open(tmp_path / SINGLE, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_parts_stay_within_the_limit_and_the_index_names_all(tmp_path):
    parts = written(tmp_path, [some(5), some(2, 5)], limit_bytes=1000)
    assert [part["file"] for part in parts] == [
        f"part-000{s}-000{n}.safetensors" for s, n in ((0, 1), (0, 2), (0, 3), (1, 1))
    ]
    assert [part["bytes"] for part in parts] == [800, 800, 400, 800]
    finish(tmp_path, parts[::-1])
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 2800
    assert index["weight_map"]["t0"] == "model-00001-of-00004.safetensors"
    assert index["weight_map"]["t6"] == "model-00004-of-00004.safetensors"
    files = WeightFiles(tmp_path)
    assert all(torch.equal(files.read(name, None, torch.float32), tensor) for name, tensor in some(7).items())


def test_a_tensor_larger_than_the_limit_has_a_file_to_itself(tmp_path):
    parts = written(tmp_path, [{"a": torch.zeros(3), "large": torch.zeros(500), "b": torch.zeros(3)}], limit_bytes=100)
    assert [part["names"] for part in parts] == [["a"], ["large"], ["b"]]


def test_a_stage_without_tensors_writes_nothing(tmp_path):
    assert written(tmp_path, [{}]) == []


def test_views_and_parameters_are_written_as_they_are(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"row": whole[1], "column": whole[:, 1], "parameter": torch.nn.Parameter(whole.bfloat16())}
    finish(tmp_path, written(tmp_path, [tensors]))
    files = WeightFiles(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(files.read(name, None, tensor.dtype), tensor.detach())
    assert (tmp_path / SINGLE).stat().st_size < 1000


def test_config_describes_the_trained_model_and_not_its_origin(tmp_path):
    config = tiny_config("llama")
    config._attn_implementation = "eager"
    config.name_or_path = "/somewhere/else"
    config.quantization_config = {"quant_method": "gguf"}
    config._model_name_or_path = "another"
    generation = GenerationConfig(
        temperature=0.7, max_new_tokens=9
    )  # its own save_pretrained refuses a temperature without sampling
    write_config(tmp_path, config, generation, torch.bfloat16, 140)
    text = (tmp_path / "config.json").read_text()
    content = json.loads(text)
    assert content["architectures"] == ["LlamaForCausalLM"]
    assert (content["dtype"], content["vocab_size"], content["model_type"]) == ("bfloat16", 140, "llama")
    assert not [word for word in ("quantization", "name_or_path", "attn_implementation", "somewhere") if word in text]
    assert config.vocab_size == 131
    assert config.quantization_config
    generated = json.loads((tmp_path / "generation_config.json").read_text())
    assert (generated["temperature"], generated["max_new_tokens"]) == (0.7, 9)


def test_no_generation_config_is_none(tmp_path):
    write_config(tmp_path, tiny_config("llama"), None, torch.float32, 131)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("base", [None, {"eos_token_id": 0, "max_new_tokens": 9}, {"eos_token_id": [0, 5]}])
def test_generation_stops_at_the_end_of_turn(tmp_path, smollm2, base):
    """SmolLM2's turns end with <|im_end|>, id 2; what a base's settings stop at besides, stays."""
    config = tiny_config("llama")
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 0, None
    write_config(tmp_path, config, GenerationConfig(**base) if base else None, torch.float32, 131)
    copy_tokenizer(smollm2, tmp_path)
    stop_at_turns(tmp_path)
    generation = GenerationConfig.from_pretrained(tmp_path)
    assert generation.eos_token_id == ([0, 5, 2] if base and "max_new_tokens" not in base else [0, 2])
    assert generation.max_new_tokens == (base or {}).get("max_new_tokens")
    assert base or generation.bos_token_id == 1
    before = (tmp_path / "generation_config.json").stat().st_mtime_ns
    stop_at_turns(tmp_path)
    assert (tmp_path / "generation_config.json").stat().st_mtime_ns == before


def test_tokenizer_is_copied(tmp_path, smollm2):
    copy_tokenizer(smollm2, tmp_path)
    assert (
        AutoTokenizer.from_pretrained(tmp_path)("Hello there").input_ids
        == AutoTokenizer.from_pretrained(smollm2)("Hello there").input_ids
    )
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(
        UserError, match=f"{tmp_path}/none holds no tokenizer: give the folder that the tokenised data was made with"
    ):
        copy_tokenizer(tmp_path / "none", tmp_path)


def test_training_facts(tmp_path):
    write_training(tmp_path, {"epochs": 2, "name": "é"})
    assert json.loads((tmp_path / "training.json").read_text()) == {"epochs": 2, "name": "é"}


def scratch_of(root: Path, content: str) -> Path:
    scratch = root / f"scratch-{content}"
    (scratch / "inner").mkdir(parents=True)
    (scratch / "inner" / "file").write_text(content)
    return scratch


def test_publish_renames(tmp_path):
    publish(scratch_of(tmp_path, "new"), tmp_path / "a" / "target")
    assert (tmp_path / "a" / "target" / "inner" / "file").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_publish_refuses_what_exists_unless_told(tmp_path):
    target = tmp_path / "target"
    publish(scratch_of(tmp_path, "old"), target)
    scratch = scratch_of(tmp_path, "new")
    with pytest.raises(UserError, match=f"{target} exists: give another folder, or remove it first"):
        publish(scratch, target)
    assert (target / "inner" / "file").read_text() == "old"
    publish(scratch, target, overwrite=True)
    assert (target / "inner" / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["target"]


def test_a_publish_that_fails_leaves_the_old_folder(tmp_path, monkeypatch):
    target, replace = tmp_path / "target", os.replace
    publish(scratch_of(tmp_path, "old"), target)
    scratch = scratch_of(tmp_path, "new")

    def failing(source: Path, destination: Path) -> None:
        if source == scratch:
            raise OSError(18, "Invalid cross-device link")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(UserError, match=r"target cannot be written \(Invalid cross-device link\): check free space"):
        publish(scratch, target, overwrite=True)
    assert (target / "inner" / "file").read_text() == "old"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/folder cannot be written \(Not a directory\): check free space"):
        ShardWriter(tmp_path / "file" / "folder", 0)


def test_a_full_disk_is_said_in_one_line(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    (tmp_path / "training.json").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"training.json cannot be written \(No space left on device\)"):
        write_training(tmp_path, {})


def test_a_file_that_safetensors_cannot_write_is_named(tmp_path):
    writer = ShardWriter(tmp_path / "gone", 0)
    writer.add("a", torch.zeros(3))
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match=r"part-0000-0001.safetensors cannot be written \(.*No such file or directory"):
        writer.close()
