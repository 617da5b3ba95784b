"""How the command line is read: a recipe as the first word, switches with a value, flags of other trainers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from sft.cli import entry
from sft.config.settings import Settings
from sft.launcher import launch

FOREIGN = """model_name_or_path: base
dataset_name: some/rows
learning_rate: 2.0e-4
num_train_epochs: 1
lr_scheduler_type: cosine
output_dir: out/mine
"""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings with which training would have started."""
    seen: list[Settings] = []

    def start(settings: Settings, argv: Any) -> int:
        seen.append(settings)
        return 0

    monkeypatch.setattr(launch, "run", start)
    return seen


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text("run_name: mine\nlr: 1.0e-4\nload_in_4bit: true\nlora: 8\n")
    return file


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    file = tmp_path / "theirs.yml"
    file.write_text(FOREIGN)
    return file


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        code = entry(argv)
    except SystemExit as ended:
        code = int(ended.code or 0)
    err = capsys.readouterr().err
    assert code == 2
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("command", [[], ["train"]])
def test_a_recipe_comes_first(asked, recipe, command):
    assert entry([*command, str(recipe), "--epochs", "5"]) == 0
    assert (asked[0].data.run_name, asked[0].schedule.lr, asked[0].schedule.epochs) == ("mine", 1e-4, 5.0)


def test_a_plan_of_a_recipe(foreign, capsys):
    assert "base" in refusal(["plan", str(foreign), "--json"], capsys)  # it was read: there is no such base


def test_a_recipe_that_is_not_there(capsys):
    assert refusal(["no.yaml"], capsys).startswith("sft train: --config no.yaml: No such file or directory")


def test_a_recipe_after_the_flags(recipe, capsys):
    assert "a recipe comes first" in refusal(["train", "--lr", "1e-5", str(recipe)], capsys)


@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        ("--load_in_4bit=false", "load_in_4bit", False),
        ("--load_in_4bit=true", "load_in_4bit", True),
        ("--tensorboard=False", "tensorboard", False),
        ("--no_tensorboard=true", "tensorboard", False),
        ("--no_tensorboard=false", "tensorboard", True),
    ],
)
def test_switches_take_a_value(asked, recipe, flag, name, value):
    assert entry([str(recipe), flag]) == 0
    assert asked[0].value(name) is value


def test_switches_of_every_command(capsys):
    said = [
        refusal(["inspect", "--run_name", "nothing", f"--json{value}"], capsys) for value in ("", "=true", "=false")
    ]
    assert len(set(said)) == 1
    assert "nothing" in said[0]
    assert "takes no value but true or false, not 'maybe'" in refusal(["--load_in_4bit=maybe"], capsys)


def test_keys_of_the_recipe_s_trainer_are_flags(asked, foreign, capsys):
    flags = ["--learning_rate=1e-5", "--num_train_epochs", "2", "--packing", "--lr_scheduler_type", "linear"]
    assert entry([str(foreign), *flags]) == 0
    (found,) = asked
    assert (found.schedule.lr, found.schedule.epochs, found.schedule.schedule) == (1e-5, 2.0, "linear")
    assert capsys.readouterr().err == (
        "sft train: warning: --packing: true: no effect: documents are always packed, and never attend to each other\n"
    )


def test_our_flags_win(asked, foreign):
    assert entry([str(foreign), "--learning_rate", "1e-5", "--lr", "3e-5", "--weight_decay", "0.5"]) == 0
    assert (asked[0].schedule.lr, asked[0].optimizer.weight_decay) == (3e-5, 0.5)


def test_what_is_refused_in_a_recipe_is_refused_as_a_flag(foreign, capsys):
    assert "fp16: true: fp16 is not supported" in refusal([str(foreign), "--fp16"], capsys)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--learning_rate", "1e-5"], "--learning_rate 1e-05 is a flag of other trainers: here it is --lr 1e-05"),
        (["--num_train_epochs=2"], "--num_train_epochs 2 is a flag of other trainers: here it is --epochs 2"),
        (["--per_device_train_batch_size", "4"], "here it is --micro_batch 4"),
        (["--per-device-train-batch-size", "4"], "here it is --micro_batch 4"),
        (["--model_name_or_path", "some/model"], "here it is --checkpoint some/model"),
        (["--dataset_name", "some/rows"], "here it is --data some/rows:train"),
        (["--bf16"], "--bf16 is a flag of other trainers: here it is --dtype bf16"),
        (["--packing", "true"], "leave it out (no effect: documents are always packed, and never"),
        (["--fp16"], "cannot be used here: fp16 is not supported"),
    ],
)
def test_without_such_a_recipe_our_flag_is_named(recipe, capsys, flags, said):
    assert said in refusal([str(recipe), *flags], capsys)
    assert said in refusal(["--run_name", "r", *flags], capsys)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--epoch", "3"], "unrecognized arguments: --epoch 3: did you mean --epochs?"),
        (["--run-name", "x"], "did you mean --run_name?"),
        (["--learning_rat", "3"], "did you mean learning_rate of other trainers: here it is --lr?"),
        (["--zero", "3"], "unrecognized arguments: --zero 3"),
    ],
)
def test_unknown_flags_get_a_suggestion(foreign, capsys, flags, said):
    assert said in refusal(["--run_name", "r", *flags], capsys)
    assert said in refusal([str(foreign), *flags], capsys)


def test_suggestions_of_other_commands(capsys):
    assert "unrecognized arguments: --prompts: did you mean --prompt?" in refusal(
        ["generate", "folder", "--prompts"], capsys
    )


def test_settings_of_a_parser_without_other_flags():
    from sft.resolve.settings import settings_of

    assert settings_of(argparse.Namespace(run_name="r")).data.run_name == "r"
