"""Recipes: what a YAML file gives, what it may not, and that it is written down so that it gives the same again."""

from __future__ import annotations

import argparse
import itertools
import json
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from sft.checkpoint.commit import ALONE
from sft.config.flags import add_flags, typed_values
from sft.config.recipe import combined, make_settings, read_recipe, recipe_text
from sft.config.settings import Settings
from sft.observe.chart import best_of, series, write_loss_chart
from sft.spec.run_folder import to_toml
from sft.worker import loop
from sft.worker.loop import _Best
from tokenize_data.dataset import Cleaning, DatasetSpec
from tokenize_data.errors import UserError

# Eight lines, each of them nine times the one before.
BOMB = "a: &a {first}\n" + "".join(
    f"{n}: &{n} {{open}}{', '.join([f'*{p}'] * 9)}{{close}}\n" for p, n in itertools.pairwise("abcdefghi")
)


def config(tmp_path: Path, text: str, *argv: str) -> Settings:
    (tmp_path / "recipe.yaml").write_text(text)
    parser = argparse.ArgumentParser()
    add_flags(parser)
    values = combined(
        typed_values(parser.parse_args(["--config", str(tmp_path / "recipe.yaml"), *argv])), lambda line: None
    )
    return make_settings(values)


def test_a_flag_wins_over_the_recipe(tmp_path):
    found = config(
        tmp_path,
        "run_name: r\nlr: 2e-5\nsize: 70\nval: v.jsonl\ndata: [a.jsonl, b.jsonl]\n",
        "--lr",
        "1e-4",
        "--no_tensorboard",
    )
    assert (found.data.run_name, found.schedule.lr, found.model.size, found.data.val, found.data.data) == (
        "r",
        1e-4,
        "70",
        ("v.jsonl",),
        ("a.jsonl", "b.jsonl"),
    )
    assert not found.output.tensorboard
    assert config(tmp_path, "run_name: r\nloss: full\n", "--loss_mask", "0.25").objective.loss_mask == 0.25
    assert config(tmp_path, "run_name: r\nloss_mask: 0.25\n", "--loss", "full").objective.loss_mask == 1.0
    assert config(tmp_path, "run_name: r\ndatasets: [{files: a}]\n", "--data", "b").data.data == ("b",)
    assert not config(tmp_path, "run_name: r\nval_datasets: [{files: a}]\n", "--val").data.has_validation


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("lr: 2e-5", "lr", 2e-5),
        ("lr: 2.0E-5", "lr", 2e-5),
        ("lr: '3e-4'", "lr", 3e-4),
        ("lr: 1\nmin_lr: 0", "lr", 1.0),
        ("size: 070", "size", "070"),
        ("id: 2024-01-01", "id", "2024-01-01"),
        ("iters: 1e3", "iters", 1000),
        ("epochs: ${N}", "epochs", 2.0),
        ("iters: ${M:-7}", "iters", 7),
        ("checkpoint: ${NAME}/x", "checkpoint", "base/x"),
        ("checkpoint: $${NAME}", "checkpoint", "${NAME}"),
        ("tensorboard: off", "tensorboard", False),
        ("loss: completion", "loss_mask", 0.0),
        ("loss: full", "loss_mask", 1.0),
        ("lora_targets: q_proj\nlora: 8", "lora_targets", ("q_proj",)),
        ("early_stopping_min_delta: .5", "early_stopping_min_delta", 0.5),
    ],
)
def test_values(tmp_path, monkeypatch, text, key, value):
    monkeypatch.setenv("N", "2")
    monkeypatch.setenv("NAME", "base")
    assert config(tmp_path, f"run_name: r\n{text}\n").value(key) == value


def test_extends(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "lowest.yaml").write_text(
        "lr: 1e-3\nseq: 512\nloss: full\ndatasets: [{files: x, prompt: '{q}'}]\nearly_stopping: 3\n"
    )
    (tmp_path / "inner" / "middle.yaml").write_text("extends: ../lowest.yaml\nseq: 256\nloss_mask: 0.5\n")
    found = config(tmp_path, "extends: inner/middle.yaml\nrun_name: r\ndata: [y]\nearly_stopping: null\n")
    assert (found.schedule.lr, found.data.seq, found.objective.loss_mask, found.data.datasets, found.data.data) == (
        1e-3,
        256,
        0.5,
        (),
        ("y",),
    )
    assert found.output.early_stopping is None
    (tmp_path / "lowest.yaml").write_text("extends: recipe.yaml\n")
    with pytest.raises(UserError, match=r"extends itself \(recipe.yaml -> middle.yaml -> lowest.yaml -> recipe.yaml\)"):
        config(tmp_path, "extends: inner/middle.yaml\nrun_name: r\n")


def test_accumulated_rows(tmp_path):
    text = "run_name: r\nmicro_batch: 4\ngradient_accumulation: 2\n"
    assert config(tmp_path, text).schedule.gradient_accumulation == 2  # what it comes to is known with the layout
    typed = config(tmp_path, text, "--global_batch", "6")
    assert (typed.schedule.gradient_accumulation, typed.schedule.global_batch) == (None, 6)
    with pytest.raises(UserError, match="--gradient_accumulation 0 must be at least 1"):
        config(tmp_path, text, "--gradient_accumulation", "0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quux: 1", "unknown key 'quux': `sft train -h` lists all keys"),
        ("warmup_fracton: 1", "unknown key 'warmup_fracton': did you mean 'warmup_fraction'?"),
        ("hostfile: hosts", "unknown key 'hostfile'"),
        ("rank: 1", "unknown key 'rank'"),
        ("lr: fast", "lr must be a number, not 'fast'"),
        ("iters: 1.5", "iters must be a whole number, not 1.5"),
        ("iters: yes", "iters must be a whole number, not True"),
        ("tensorboard: 1", "tensorboard must be true or false, not 1"),
        ("id: no", "id must be text, not False: write it in quotes"),
        ("id: 1.10", "id must be text, not 1.1: write it in quotes"),
        ("id: [a]", "id must be text"),
        ("data: {a: b}", "data must be text"),
        ("loss: all", "loss: 'all': use completion or full"),
        ("lr: -1", "--lr -1.0 must be above 0"),
        ("loss: full\nloss_mask: 1", "'loss' and 'loss_mask', which say the same in two ways"),
        ("lr: 1\nlr: 2", "'lr' is given twice, again in line 3"),
        ("data: ${NO_SUCH}", "${NO_SUCH}: there is no such environment variable"),
        ("1: 2", "the key 1 is not text"),
        ("extends: {}", "extends must be another recipe's path"),
        ("extends: none.yaml", "No such file"),
        ("datasets: [{files: a, promt: b}]", "datasets[0]: unknown key 'promt': did you mean 'prompt'?"),
        ("samples: 3\ndatasets: [{files: a}]", "give each of the datasets its own 'samples'"),
        ("a: &a [*a]", "an anchor contains itself"),
        ("a: !!python/object/apply:os.system [ls]", "is not valid YAML"),
        ("a: " + "[" * 5000, "is not valid YAML"),
        ("? {a: b}\n: c", "is not valid YAML"),
        ("a: \x00", "is not valid YAML"),
        (BOMB.format(first="[x]", open="[", close="]"), "stands for more than 100,000 values"),
        (BOMB.format(first="{x: 1}", open="{<<: [", close="]}"), "stands for more than 100,000 values"),
    ],
)
def test_what_a_recipe_may_not_say(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        config(tmp_path, f"run_name: r\n{text}\n")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe", "is not valid YAML"), (b"", "not nothing"), (b"[1]", "a recipe is a mapping")],
)
def test_files_that_are_none(tmp_path, content, message):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_recipe(tmp_path / "r.yaml")
    with pytest.raises(UserError, match="is a directory"):
        read_recipe(tmp_path)
    with pytest.raises(UserError, match="is not a regular file"):
        read_recipe(Path("/dev/zero"))
    (tmp_path / "big.yaml").write_text("#" * 2_000_000)
    with pytest.raises(UserError, match="more than any recipe"):
        read_recipe(tmp_path / "big.yaml")


def test_a_run_s_own_recipe_gives_the_same_run(tmp_path):
    spec = DatasetSpec(
        files=("a:b:c",),
        name="1",
        prompt="{x} ${HOME} $$ 'é' \n\\n # no",
        weight=0.5,
        clean=Cleaning(drop="[^a]", strip=True),
    )
    given = Settings.of(
        run_name="070",
        size="7",
        id="no",
        checkpoint="1e3",
        datasets=(spec,),
        val=("- x", "a b"),
        lr=1e-5,
        min_lr=1e-7,
        early_stopping=3,
        template="{% for m in messages %}\n{{ m.content }}{% endfor %}",
        tensorboard=False,
        sequence_parallel=False,
        samples=None,
        clip=0.0,
    )
    (tmp_path / "recipe.yaml").write_text(recipe_text(given))
    assert make_settings(read_recipe(tmp_path / "recipe.yaml")) == given
    assert tomllib.loads(to_toml({"config": given.as_json()}))["config"]["datasets"][0]["weight"] == 0.5


def test_least_improvement():
    best = _Best(2, 0.1)
    assert [best.is_better(number, loss) for number, loss in enumerate([3.0, 2.95, 2.85, 2.8, 2.79], 1)] == [True] * 5
    assert best.is_enough
    assert best.iteration == 5
    slow = _Best(2, 0.0)
    assert [slow.is_better(number, loss) for number, loss in enumerate([3.0, 2.99, 3.1], 1)] == [True, True, False]
    assert not slow.is_enough


def test_a_resumed_run_remembers_its_validations(tmp_path, monkeypatch):
    lines = [{"iteration": n, "loss": 1.0, "val_loss": loss} for n, loss in enumerate([3.0, 2.0, 2.5, 1.0], 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = SimpleNamespace(settings=Settings.of(run_name="r", val=("v",), early_stopping=2), folder=tmp_path)
    asked = []
    monkeypatch.setattr(loop, "damage", lambda folder: asked.append(folder.name))
    assert loop._earlier_validations(job, ALONE, 3) == [(1, 3.0), (2, 2.0), (3, 2.5)]
    assert asked == ["step-0000002"]
    monkeypatch.setattr(loop, "damage", lambda folder: "is not there")
    assert loop._earlier_validations(job, ALONE, 3) == []  # its best could not be exported
    assert loop._earlier_validations(job, ALONE, 0) == []


def test_the_curve_shows_which_model_was_kept(tmp_path):
    pytest.importorskip("matplotlib")
    records = [
        {"iteration": n, "loss": 3.0 - n / 10, "val_loss": loss} for n, loss in enumerate([2.0, 1.5, 1.7, 1.6], 1)
    ]
    assert best_of(series(records, "val_loss")) == (2, 1.5)
    assert best_of(series(records, "nothing")) is None
    assert write_loss_chart(records, tmp_path / "plain.png")
    assert write_loss_chart(records, tmp_path / "marked.png", mark_best=True)
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "marked.png").read_bytes()


def test_an_empty_list_that_is_no_default_is_written(tmp_path):
    config = make_settings({"run_name": "r", "lora": 8, "lora_targets": ()})
    (tmp_path / "r.yaml").write_text(recipe_text(config))
    assert make_settings(read_recipe(tmp_path / "r.yaml")) == config
