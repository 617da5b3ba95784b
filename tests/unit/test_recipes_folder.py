"""The recipes of recipes/: each starts, with a tiny model of its family in place of the real one; and the schema that
describes them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sft.config import schema
from sft.config.flags import add_flags, typed_values
from sft.config.recipe import combined, make_settings
from sft.config.schedule import SCHEDULES
from sft.config.settings import RECIPE_KEYS, Settings
from sft.resolve import data_stage
from sft.resolve.base import find_base_model
from sft.resolve.run import resolve
from sft.sweep.grid import read_sweep
from tests.models import tiny_config
from tokenize_data.cli import entry as tokenize_entry
from tokenize_data.dataset import Cleaning, DatasetSpec
from tokenize_data.recipe_file import parse_yaml, read_recipe_file

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("sweep"))
# recipe -> (tiny model, tokenizer), of the family that it is for
FAMILY = {
    "meditron-7b-pubmedqa": ("llama1", "llama2"),
    "meditron-70b-pubmedqa": ("llama", "llama2"),
    "llama2-mix-lora": ("llama", "llama2"),
    "llama3-mix-lora": ("llama", "llama3"),
    "gemma": ("gemma", "gemma"),
    "llama": ("llama", "llama3"),
    "mistral": ("mistral", "mistral"),
    "opt-350m": ("opt-350m", "gpt2"),
    "pythia-70m-reviews": ("gpt-neox", "gpt2"),
    "demo": ("llama3-tied", "smollm"),
    "early-stopping": ("llama", "llama2"),
}
ROW = {
    "prompt": "Is it?",
    "gold": "Yes.",
    "dialogue": "A: yes",
    "summary": "Yes.",
    "context": "It is.",
    "question": "Is it?",
    "answer": "Yes.",
    "text": "It is.",
    "Text": "Good <br> tea",
    "Summary": "Good.",
}


def asked(recipe: str, *argv: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    values = combined(typed_values(parser.parse_args(["--config", str(FOLDER / f"{recipe}.yaml"), *argv])), pytest.fail)
    return make_settings(values)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with every file that a recipe names, and the data stage in this process."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("DATA", "data"), ("GUANACO", "data/guanaco.jsonl"), ("SUMMARIES", "20")):
        monkeypatch.setenv(name, value)

    def run_here(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-m", "tokenize_data"]
        return subprocess.CompletedProcess(command, tokenize_entry([*command[3:], "--workers", "1"]))

    monkeypatch.setattr(data_stage.subprocess, "run", run_here)
    return tmp_path


FLAGS = ("--checkpoint", "tiny", "--tp", "1", "--pp", "1", "--seq", "120")


def lay_out(place: Path, family: Callable[[str], Path], recipe: str) -> Settings:
    """A tiny model of the recipe's family and the files that it names; the recipe with that model."""
    model, tokenizer = FAMILY[recipe]
    torch.manual_seed(0)
    config = tiny_config(model)
    config.vocab_size = 2000
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(place / "tiny")
    for file in family(tokenizer).iterdir():
        (place / "tiny" / file.name).write_bytes(file.read_bytes())
    given = asked(recipe, *FLAGS)
    files = [
        *given.data.data,
        *given.data.val,
        *(name for spec in (*given.data.datasets, *given.data.val_datasets) for name in spec.files),
    ]
    assert files
    for name in files:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        row = {"text": "It is."} if "guanaco" in name else ROW
        Path(name).write_text("".join(json.dumps({**row, "number": number}) + "\n" for number in range(30)))
    return given


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_starts_with_a_tiny_model_of_its_family(place: Path, family: Callable[[str], Path], recipe: str):
    given = lay_out(place, family, recipe)
    assert data_stage.tokenise(given, find_base_model(given)) == 0
    job = resolve(given)
    assert job.iterations >= 1
    assert (job.validation is not None) == given.data.has_validation
    assert job.base.family == tiny_config(FAMILY[recipe][0]).model_type
    assert job.settings.adapters.lora == given.adapters.lora


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_it_trains_a_tiny_model_of_its_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: Callable[[str], Path], recipe: str
):
    monkeypatch.chdir(tmp_path)
    for name, value in (
        ("DATA", "data"),
        ("GUANACO", "data/guanaco.jsonl"),
        ("SUMMARIES", "20"),
        ("PYTHONPATH", str(FOLDER.parent)),
    ):
        monkeypatch.setenv(name, value)
    given = lay_out(tmp_path, family, recipe)
    command = [sys.executable, "-m", "sft", "train", "--config", str(FOLDER / f"{recipe}.yaml"), *FLAGS, "--iters", "2"]
    done = subprocess.run(
        [*command, "--dtype", "fp32", "--global_batch", "4", "--nproc_per_node", "1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (metrics,) = Path(given.output.save_checkpoint_dir).glob("*/metrics.jsonl")
    assert {"iteration", "loss"} <= json.loads(metrics.read_text().splitlines()[0]).keys()
    assert (metrics.parent / ("adapter" if given.adapters.lora else "hf")).is_dir()


def test_the_recipes_say_what_they_are_named_after():
    assert FAMILY.keys() == set(RECIPES)
    seventy = asked("meditron-70b-pubmedqa")
    assert (
        seventy.model.checkpoint,
        seventy.model.size,
        seventy.layout.tp,
        seventy.layout.pp,
        seventy.schedule.lr,
    ) == ("meditron", "70", 8, 8, 1e-5)
    adapters = asked("llama3-mix-lora")
    assert (
        adapters.adapters.lora,
        adapters.adapters.load_in_4bit,
        adapters.data.template,
        len(adapters.data.datasets),
    ) == (16, True, "llama3", 2)
    assert [asked("mistral", *flags).objective.loss_mask for flags in ([], ["--loss", "full"])] == [0.0, 1.0]


def test_the_schema_is_that_of_the_dataclasses():
    assert (FOLDER / "schema.json").read_text() == schema.text(), "python -m sft.config.schema > recipes/schema.json"
    found = schema.schema()
    settings = set(RECIPE_KEYS)
    assert set(found["properties"]) == settings | {"extends", "loss", "load_in_8bit"}
    assert set(found["$defs"]["dataset"]["properties"]) == {entry.name for entry in fields(DatasetSpec)}
    assert set(found["$defs"]["dataset"]["properties"]["clean"]["properties"]) == {
        entry.name for entry in fields(Cleaning)
    }
    assert found["properties"]["schedule"]["enum"] == [*SCHEDULES, None]
    assert found["properties"]["warmup_fraction"]["maximum"] == 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_schema_takes_the_recipes(recipe: str):
    """With the few words of JSON Schema that it uses."""
    text = (FOLDER / f"{recipe}.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    found = schema.schema()
    assert complaints(parse_yaml(text, recipe), found, found["$defs"]) == []


def complaints(value: Any, known: dict[str, Any], others: dict[str, Any]) -> list[str]:
    if "$ref" in known:
        known = others[known["$ref"].rpartition("/")[2]]
    if "anyOf" in known:
        return min((complaints(value, choice, others) for choice in known["anyOf"]), key=len)
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": int | float,
        "boolean": bool,
        "null": type(None),
    }
    wanted = known.get("type", [])
    wanted = [wanted] if isinstance(wanted, str) else wanted
    if wanted and not any(isinstance(value, kinds[kind]) for kind in wanted):
        return [f"{value} is no {wanted}"]
    if "enum" in known and value not in known["enum"]:
        return [f"{value} not in {known['enum']}"]
    if isinstance(value, int | float) and value <= known.get("exclusiveMinimum", float("-inf")):
        return [f"{value} <= {known['exclusiveMinimum']}"]
    if isinstance(value, list):
        return [text for part in value for text in complaints(part, known.get("items", {}), others)]
    if isinstance(value, dict):
        found = [f"no {name}" for name in known.get("required", []) if name not in value]
        for key, part in value.items():
            inner = known["properties"].get(key)
            found += [key] if inner is None else [f"{key}: {text}" for text in complaints(part, inner, others)]
        return found
    return []


def test_the_schema_refuses_what_the_recipe_reader_refuses():
    found = schema.schema()
    wrong = {"run_name": "r", "lr": -1.0, "schedule": "cosin", "datasets": [{}], "lernrate": 1, "iters": 1.5}
    assert complaints(wrong, found, found["$defs"]) == [
        "lr: -1.0 <= 0",
        f"schedule: cosin not in {[*SCHEDULES, None]}",
        "datasets: no files",
        "lernrate",
        "iters: 1.5 is no ['integer', 'null', 'string']",
    ]


def test_the_sweep_of_few_rows():
    sweep = read_sweep(FOLDER / "sweep-few-rows.yaml")
    assert len(sweep.trials) == 3 * 2 * 3 * 2
    assert (
        len({trial.values["run_name"] for trial in sweep.trials}) == 3 * 3
    )  # shards: a model's template, a number of rows
    assert read_recipe_file(FOLDER / "sweep-few-rows.yaml")["axes"]["samples"] == [60, 120, 180]
