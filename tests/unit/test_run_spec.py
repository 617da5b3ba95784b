"""A run, resolved once: complete, and the same after it was written and read."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sft.config.flags import add_flags, typed_values
from sft.config.recipe import combined, make_settings, read_recipe
from sft.config.settings import Settings
from sft.resolve.local import local_copy
from sft.resolve.run import resolve
from sft.resolve.summary import early_stopping_warning
from sft.spec.run import RunSpec
from tests.conftest import Workbench, pair
from tests.unit.test_plan_command import BaseStub
from tests.unit.test_plan_search import LLAMA_8B
from tokenize_data.bases import Base
from tokenize_data.dataset import Cleaning, DatasetSpec
from tokenize_data.errors import UserError

SMALL = LLAMA_8B | {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 999}
# None means off, or a rule that only a running process can apply.
MAY_BE_NONE = {
    "samples": "all rows",
    "system_key": "no system message",
    "weight_key": "all rows count once",
    "val_group": "rows are drawn one by one",
    "early_stopping_on": "all validation data together",
    "chat_template_kwargs": "the template's own defaults",
    "intermediate_iter": "the released model",
    "size": "a folder has none",
    "checkpoints_file": "a folder is no entry",
    "gradient_accumulation": "global_batch holds the number",
    "warmup_iters": "warmup_fraction applies",
    "lora": "no adapters",
    "lora_alpha": "no adapters",
    "quantise": "in the format of the model",
    "adapter": "no adapter to start from",
    "gpu_file": "no file",
    "hang_timeout": "ten usual iterations",
    "hostfile": "this host alone",
    "id": "no name",
    "early_stopping": "off",
    "push_to_hub": "off",
}


@pytest.fixture
def settings(bench: Workbench, tmp_path: Path) -> Settings:
    bench.tokenize("--data", bench.jsonl([pair(f"Number {i}?", f"It is {i}.") for i in range(80)]))
    return Settings.of(
        run_name="r",
        tokenized_data_dir=str(bench.tokenized),
        checkpoint=str(bench.base),
        save_checkpoint_dir=str(tmp_path),
    )


def spec_of(settings: Settings) -> RunSpec:
    base: Any = BaseStub(SMALL)
    spec = resolve(settings, base)
    from sft.spec.base import BaseModel

    model = BaseModel(
        entry=Base(name="base", path="a/base", add_tokens=("<x>",)),
        folder=Path("somewhere"),
        config=SMALL,
        num_parameters=7,
        is_entry=False,
        fingerprint="f" * 64,
    )
    return replace(spec, base=model)


@pytest.mark.parametrize("given", [{}, {"lora": 8, "gradient_accumulation": 2, "nproc_per_node": 2, "tp": 2}])
def test_no_choice_is_left_open(settings, given):
    spec = spec_of(settings.replace(**given))
    for name, value in spec.settings.items():
        assert value is not None or name in MAY_BE_NONE, name
    assert (spec.settings.adapters.lora_alpha is None) == ("lora" not in given)
    assert (spec.iterations, spec.micro_batch, spec.recompute, spec.dtype) == (
        spec.settings.schedule.iters,
        spec.settings.layout.micro_batch,
        spec.settings.layout.recompute,
        "fp32",
    )
    assert spec.asked.schedule.iters is None  # what the user asked for stays known


def test_columns_of_the_shards_are_no_format_of_the_run(settings, bench):
    rows = [{"instruction": f"Number {i}?", "output": f"It is {i}."} for i in range(8)]
    (bench.root / "rows.json").write_text(json.dumps(rows))
    (bench.root / "dataset_info.json").write_text(json.dumps({"numbers": {"file_name": "rows.json"}}))
    assert bench.tokenize("--data", f"{bench.root}/dataset_info.json:numbers", run_name="lf").code == 0
    spec = spec_of(settings.replace(run_name="lf"))
    assert spec.settings.data.format is None
    assert spec.data.documents == 8
    assert spec_of(settings).settings.data.format == "qa"


def test_once_an_epoch_is_a_number_of_iterations(settings):
    spec = spec_of(settings.replace(eval_each_epoch=True, save_each_epoch=True, global_batch=32, epochs=2.0))
    output = spec.settings.output
    assert (output.eval_interval, output.save_interval) == (3, 3)  # 80 documents


@pytest.mark.parametrize(
    ("patience", "interval", "said"),
    [
        (3, 2, None),
        (4, 2, "--early_stopping 4 cannot stop this run, which has 4 validations before its end (10 iterations, one"),
        (1, 10, "which has 0 validations before its end"),
        (None, 10, None),
        (1_000_000, 2, None),  # keeps the best model
    ],
)
def test_early_stopping_that_cannot_happen_is_a_warning(settings, bench, patience, interval, said):
    spec = spec_of(settings.replace(iters=10, eval_interval=interval))
    spec = replace(spec, settings=spec.settings.replace(early_stopping=patience))
    found = early_stopping_warning(spec)
    assert (found is None) if said is None else (said in str(found))


def test_written_and_read_it_is_the_same(settings, tmp_path):
    data = (DatasetSpec(files=("a", "b"), name="one", weight=0.5, clean=Cleaning(drop="x", lower=True)),)
    spec = spec_of(settings.replace(lora=8, lora_targets=("q_proj", "k_proj"), nproc_per_node=2, pp=2))
    spec = replace(spec, asked=spec.asked.replace(datasets=data), validation=spec.data)
    (tmp_path / "run.json").write_text(spec.text())
    assert RunSpec.read(tmp_path / "run.json") == spec
    assert [len(stage) for stage in spec.stages] == [1, 1]


def test_run_json_repeats_a_run(settings, tmp_path):
    data = (DatasetSpec(files=("${HOME}/a",), name="one", prompt="{x}"),)
    spec = spec_of(settings.replace(lr=1e-4, epochs=5.0))
    spec = replace(spec, asked=spec.asked.replace(datasets=data, addr="10.0.0.1"))
    (tmp_path / "run.json").write_text(spec.text())
    parser = argparse.ArgumentParser()
    add_flags(parser)
    arguments = parser.parse_args(["--config", str(tmp_path / "run.json"), "--id", "again"])
    again = make_settings(combined(typed_values(arguments), pytest.fail))
    assert again == spec.asked.replace(id="again", addr="localhost")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "was not written by this version of sft: install one version everywhere"),
        ({"data": {}}, "is damaged"),
        ({"settings": {"unknown": 1}}, "is damaged"),
        ({"asked": None}, "is damaged"),
        ({"stages": [[0]]}, "is damaged"),
    ],
)
def test_a_damaged_file_is_refused(settings, tmp_path, change, message):
    content = spec_of(settings).as_json() | change
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        RunSpec.read(tmp_path / "run.json")
    if "asked" in change:
        with pytest.raises(UserError, match=r"is not a run\.json of this version"):
            read_recipe(tmp_path / "run.json")


def test_data_that_was_replaced_since_is_refused(settings):
    spec = spec_of(settings)
    assert len(spec.data.open()) == 80
    with pytest.raises(UserError, match="was tokenised again while this run was starting"):
        replace(spec.data, fingerprint="0" * 64).open()


def test_another_node_uses_its_own_folders(settings, tmp_path, monkeypatch):
    spec = spec_of(settings)
    here: Any = BaseStub(SMALL)
    here.folder = tmp_path / "base"
    monkeypatch.setattr("sft.resolve.local.find_base_model", lambda _: here)
    away = replace(spec, data=replace(spec.data, folder=Path("elsewhere"), fingerprint="0" * 64))
    local = local_copy(away, settings)
    assert (local.base, local.data) == (here, spec.data)
    assert (local.layout, local.settings) == (spec.layout, spec.settings)
    with pytest.raises(UserError, match="nothing"):
        local_copy(away, settings.replace(tokenized_data_dir="nothing"))
