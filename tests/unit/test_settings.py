"""What flags and recipes come to on this machine: names that were changed, and what is said of them."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sft.checkpoint.merge_adapters import _bits_of
from sft.config.flags import add_flags
from sft.config.settings import FIXED, SUFFIXES, Settings
from sft.resolve.run import resolve
from sft.resolve.settings import settings_of
from sft.worker import saving
from tests.conftest import Workbench, pair
from tests.unit.test_plan_command import BaseStub
from tests.unit.test_plan_search import LLAMA_8B
from tokenize_data.errors import UserError

ROOT = Path(__file__).parents[2]
SMALL = LLAMA_8B | {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 999}


def settings(*argv: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return settings_of(parser.parse_args(["--run_name", "r", *argv]))


@pytest.mark.parametrize("is_worker", [False, True])
def test_the_older_name_of_8_bits_works_and_says_so(capsys, monkeypatch, tmp_path, is_worker):
    monkeypatch.setenv("RANK", "0") if is_worker else monkeypatch.delenv("RANK", raising=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("load_in_8bit: true\n")
    for argv in (["--load_in_8bit"], ["--config", str(recipe)]):
        assert settings(*argv, "--lora", "8").adapters.weight_only_8bit
        said = capsys.readouterr().err
        assert ("--load_in_8bit is called --weight_only_8bit now" in said) is not is_worker  # the launcher has said it
        assert said.count("\n") == (0 if is_worker else 1)
    recipe.write_text("load_in_8bit: false\n")
    assert not settings("--config", str(recipe)).adapters.weight_only_8bit
    assert settings("--weight_only_8bit", "--lora", "8").adapters.weight_only_8bit
    assert capsys.readouterr().err == ""
    with pytest.raises(
        UserError, match="--weight_only_8bit freezes the base weights, so full fine-tuning is not possible"
    ):
        settings("--load_in_8bit")


def test_checkpoints_and_adapters_of_the_older_name_are_understood(bench: Workbench, tmp_path: Path):
    bench.tokenize("--data", bench.jsonl([pair(f"Number {i}?", f"It is {i}.") for i in range(8)]))
    config = Settings.of(
        run_name="r", tokenized_data_dir=str(bench.tokenized), checkpoint=str(bench.base), lora=8, weight_only_8bit=True
    )
    base: Any = BaseStub(SMALL)
    job = resolve(config, base)
    old = {name: value for name, value in job.asked.as_json().items() if name != "weight_only_8bit"} | {
        "load_in_8bit": True
    }
    facts = {"config": old, "resolved": job.facts(), "next_batch": saving.next_batch(job, 1)}
    checkpoint: Any = SimpleNamespace(manifest={"facts": facts}, iteration=1, folder=tmp_path / "step-0000001")
    saving.check(job, checkpoint)
    with pytest.raises(UserError, match="was made with weight_only_8bit True, this run has False"):
        saving.check(replace(job, asked=job.asked.replace(weight_only_8bit=False)), checkpoint)
    assert _bits_of({"config": old}) == 8
    assert _bits_of({"config": job.asked.as_json()}) == 8


def test_what_a_run_cannot_change_on_resume_and_what_names_its_folder_are_facts_of_the_fields():
    assert set(FIXED) == {
        *("seed", "global_batch", "loss_mask", "label_smoothing", "optimizer"),
        *("lora", "lora_alpha", "lora_dropout", "lora_targets", "lora_rslora", "lora_modules_to_save"),
        *("load_in_4bit", "weight_only_8bit", "quantise"),
    }
    assert SUFFIXES == (("epochs", "ep"), ("seq", "seq"), ("loss_mask", "loss"), ("lora", "lora"))


def test_few_files_read_the_setting_lora():
    """A newcomer can follow a flag. Rules that translate other trainers' recipes are left out."""
    reads = re.compile(r"(?<!model)\.lora\b|\"lora\"")
    files = [path for path in (ROOT / "sft").rglob("*.py") if "foreign" not in path.parts]
    readers = [str(path.relative_to(ROOT)) for path in files if reads.search(path.read_text())]
    assert len(readers) <= 10, readers
