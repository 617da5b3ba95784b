"""The Python API: what is light, what is refused and how, what is read from a run's folder, plans and data."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import sft
from sft.cli import entry
from sft.launcher import processes
from sft.resolve.settings import settings_from
from tests import tiny
from tests.conftest import pair
from tests.unit.test_plan_command import LLAMA_8B, write_config
from tests.unit.test_runs import make_run

_LIGHT = """
import sys
before = set(sys.modules)
import sft
heavy = {"torch", "transformers", "numpy", "rich"}
print(len(set(sys.modules) - before), sorted({*heavy, "sft.api"} & set(sys.modules)))
sft.UserError, sft.fine_tune, sft.load_run, sft.plan, sft.tokenize
print(sorted(heavy & set(sys.modules)))
"""
# A python that trains nothing: a worker leaves why it stopped, as `sft.worker.ending` does, and an exit code.
_FAKE_PYTHON = """#!/bin/sh
case "$*" in
  *worker_process*)
    note='{{"code": {code}, "message": "{reason}", "is_consequence": false, "time": 0}}'
    echo "$note" > $SFT_NOTES/$RANK.json
    exit {code};;
  *) exec {python} "$@";;
esac
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: Callable[[str], Path]) -> Path:
    """A folder with a tiny base and data, and this process in it."""
    monkeypatch.chdir(tmp_path)
    tiny.make_model(tmp_path / "base", family("smollm"))
    rows = [pair(f"Is it {n}?", f"Yes, {n}.") for n in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def fine_tune(**settings: Any) -> sft.Run:
    return sft.fine_tune(**{"checkpoint": "base", "run_name": "r", "data": ["train.jsonl"], "seq": 128} | settings)


def test_the_import_is_light():
    done = subprocess.run([sys.executable, "-c", _LIGHT], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    count, names = first.split(" ", 1)
    assert int(count) < 60
    assert (names, second) == ("[]", "[]")


def test_the_package_shows_the_api():
    assert {"fine_tune", "load_run", "plan", "tokenize", "Run", "UserError", "FailedError"} <= set(dir(sft))
    with pytest.raises(AttributeError, match="module 'sft' has no attribute 'fine_tun'"):
        sft.fine_tun  # type: ignore[attr-defined]  # noqa: B018
    for package in ("sft", "tokenize_data"):
        assert (Path(sft.__file__).parents[1] / package / "py.typed").exists()


def test_settings_are_python_values():
    settings = settings_from(
        {
            "checkpoint": Path("models") / "base",
            "run_name": "r",
            "data": (Path("a.jsonl"), "b.jsonl"),
            "val": 500,
            "size": 70,
            "lr": np.float32(0.5),
            "iters": np.int64(7),
            "tensorboard": False,
            "loss": "full",
            "clip": None,
            "rank": 0,
        },
        "fine_tune()",
    )
    assert settings.model.checkpoint == "models/base"
    assert settings.data.data == ("a.jsonl", "b.jsonl")
    assert settings.data.val == ("500",)
    assert settings.model.size == "70"
    assert (settings.schedule.lr, settings.schedule.iters, settings.optimizer.clip) == (0.5, 7, 1.0)
    assert settings.output.tensorboard is False
    assert settings.objective.loss_mask == 1.0


def test_a_setting_wins_over_the_recipe_and_none_takes_a_key_away(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("run_name: r\nlr: 1e-3\nlora: 16\nepochs: 2\n")
    settings = settings_from({"config": tmp_path / "recipe.yaml", "lr": 1e-5, "lora": None}, "fine_tune()")
    assert (settings.schedule.lr, settings.adapters.lora, settings.schedule.epochs) == (1e-5, None, 2.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lrr": 1}, "unrecognized arguments: --lrr 1: did you mean --lr?"),
        ({"learning_rate": 1e-5}, "--learning_rate 1e-05 is a flag of other trainers: here it is --lr 1e-05"),
        ({"lr": "fast"}, r"fine_tune\(\): lr must be a number, not 'fast'"),
        ({"tensorboard": 1}, r"fine_tune\(\): tensorboard must be true or false, not 1"),
        ({"lr": -1.0}, "--lr -1.0 must be above 0"),
        ({"run_name": None}, "--run_name is missing"),
        ({"hostfile": "hosts"}, "--hostfile hosts starts commands over ssh, which fine_tune"),
        ({"checkpoint": "no_such"}, "has no checkpoint 'no_such' and no folder has that name"),
    ],
)
def test_wrong_settings_are_user_errors(settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sft.UserError, match=message):
        fine_tune(**settings)
    assert list(tmp_path.iterdir()) == []


def test_torchrun_starts_commands(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(sft.UserError, match=r"here RANK is 1 already: .* torchrun -m sft"):
        fine_tune()


def test_what_the_data_stage_refuses_is_raised_and_not_printed(home: Path, capfd: pytest.CaptureFixture[str]):
    (home / "train.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(sft.UserError, match=r"train.jsonl line 1: no key 'prompt'"):
        fine_tune()
    with pytest.raises(sft.UserError, match=r"train.jsonl line 1: no key 'prompt'"):
        sft.tokenize(run_name="r", data="train.jsonl", checkpoint="base")
    captured = capfd.readouterr()
    assert "no key" not in captured.out + captured.err


@pytest.mark.parametrize(("code", "kind"), [(2, sft.UserError), (3, sft.FailedError), (75, sft.FailedError)])
def test_how_workers_end(
    code: int, kind: type[Exception], home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    python = home / "python"
    python.write_text(_FAKE_PYTHON.format(code=code, reason="the loss is NaN", python=sys.executable))
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(kind, match="the loss is NaN") as raised:
        fine_tune()
    assert getattr(raised.value, "exit_code", 2) == code
    assert not (isinstance(raised.value, sft.UserError) and isinstance(raised.value, sft.FailedError))
    captured = capfd.readouterr()
    assert "1 process = tp 1 x pp 1 x dp 1" in captured.out
    assert "NaN" not in captured.err
    assert not list((home / "checkpoints").rglob(".lease.json"))


def test_restarts_are_said_and_the_last_reason_is_raised(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    python = home / "python"
    python.write_text(_FAKE_PYTHON.format(code=3, reason="out of memory", python=sys.executable))
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(sft.FailedError, match="out of memory"):
        fine_tune(max_restarts=1)
    err = capfd.readouterr().err
    assert err.endswith("sft train: out of memory\nsft train: restarting from the latest checkpoint (1 of 1)\n"), (
        "and the last one is the exception"
    )


def test_a_crash_is_a_failure_with_its_cause(monkeypatch: pytest.MonkeyPatch):
    def crash(*_: object) -> None:
        raise ZeroDivisionError("in two\nlines")

    monkeypatch.setattr("sft.launcher.from_python.fine_tune", crash)
    with pytest.raises(sft.FailedError, match=r"^ZeroDivisionError: in two lines$") as raised:
        fine_tune()
    assert raised.value.exit_code == 3
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_workers_can_be_started_from_a_thread():
    codes: list[int] = []

    def work() -> None:
        codes.append(processes.start("train", ["-c", "pass"], processes.NodeSlot(per_node=1)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_run_is_what_its_files_say(tmp_path: Path):
    folder = make_run(tmp_path / "run", "failed")
    run = sft.load_run(str(folder))
    assert run.folder == folder
    assert [record["loss"] for record in run.metrics] == [2.5, 2.0, 1.5]
    assert run.status | {"updated": ""} == {
        "state": "failed",
        "iteration": 2,
        "iterations": 12,
        "reason": "loss is NaN",
        "updated": "",
    }
    for ask in (run.model, run.tokenizer):
        with pytest.raises(sft.UserError, match=r"no model, its state is failed: let it finish, or .* sft export"):
            ask()
    (folder / "status.json").unlink()
    (folder / "metrics.jsonl").unlink()
    assert (run.metrics, run.status["state"]) == ([], "unknown")


@pytest.mark.parametrize("name", ["", "none"])
def test_another_folder_is_no_run(tmp_path: Path, name: str):
    with pytest.raises(sft.UserError, match=r"is not a run's folder: give one with a run\.toml"):
        sft.load_run(tmp_path / name)


def test_the_model_of_a_lora_run_is_the_base_with_its_adapter(tmp_path: Path, family: Callable[[str], Path]):
    base = tiny.make_model(tmp_path / "base", family("smollm"))
    folder = make_run(tmp_path / "run", "finished")
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of peft
        tuned: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    tuned.save_pretrained(folder / "adapter")
    for file in base.glob("*token*"):
        shutil.copy(file, folder / "adapter")
    shutil.copy(base / "chat_template.jinja", folder / "adapter")
    found = sft.load_run(folder).model()
    assert isinstance(found, PeftModel)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, tuned.eval()(ids).logits)
        with found.disable_adapter():
            assert not torch.allclose(found(ids).logits, tuned(ids).logits)
    assert sft.load_run(folder).tokenizer().chat_template == (base / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limitt": 1}, "unrecognized arguments: --limitt=1: did you mean --limit?"),
        ({"limit": "all"}, "argument --limit: invalid int value: 'all'"),
        ({"data": None}, "nothing to evaluate on: give --data FILE"),
        ({"no_answers": True, "no_likelihood": True}, "--no_answers leaves nothing for --no_likelihood"),
        ({}, "none.jsonl: no such file"),
    ],
)
def test_evaluate_refuses_what_the_command_refuses(
    settings: dict[str, Any], message: str, tmp_path: Path, family: Callable[[str], Path]
):
    folder = make_run(tmp_path / "run", "finished")
    tiny.make_model(folder / "hf", family("smollm"))
    with pytest.raises(sft.UserError, match=message.replace("?", r"\?")):
        sft.load_run(folder).evaluate(**{"data": ["none.jsonl"], "no_answers": False} | settings)


def test_a_plan_is_that_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    model = write_config(tmp_path / "llama8b", LLAMA_8B)
    settings = {"gpu": "h100-80gb", "nodes": 2, "nproc_per_node": 8, "iters": 100}
    mine = sft.plan(checkpoint=model, explain=True, **settings)
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    assert entry(["plan", "--checkpoint", str(model), *flags, "--json", "--explain"]) == 0
    assert mine == json.loads(capsys.readouterr().out)
    assert (mine["iterations"], mine["tp"] * mine["pp"] * mine["dp"]) == (100, 16)
    assert "explanation" not in sft.plan(checkpoint=model, **settings)
    with pytest.raises(sft.UserError, match=r"unrecognized arguments: --gpus 3: did you mean --gpu\?"):
        sft.plan(checkpoint=model, gpus=3)
    with pytest.raises(sft.UserError, match="global_batch 63 is not divisible by dp 16"):
        sft.plan(checkpoint=model, **settings, global_batch=63, tp=1, pp=1)


def test_tokenize_returns_the_manifest(home: Path, capfd: pytest.CaptureFixture[str]):
    facts = sft.tokenize(run_name="r", data=[home / "train.jsonl"], val=2, checkpoint="base", seq=128, workers=1)
    assert (facts["documents"], facts["validation"]["documents"]) == (6, 2)
    assert facts["folder"] == str(home / "tokenized" / "r")
    assert facts["validation"]["folder"] == str(home / "tokenized" / "r-val")
    written = json.loads((home / "tokenized" / "r" / "manifest.json").read_text())
    assert {name: facts[name] for name in ("tokens", "rows", "seq", "shards")} == {
        name: written[name] for name in ("tokens", "rows", "seq", "shards")
    }
    assert "tokenize_data: 6 documents" in capfd.readouterr().out
    alone = sft.tokenize(run_name="r", checkpoint="base", seq=128, retokenize=False)
    assert (alone["created"], alone["validation"]) == (facts["created"], None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"wokers": 1}, "unrecognized arguments: --wokers=1: did you mean --workers?"),
        ({"seq": 1}, "--seq 1 must be at least 2"),
        ({"run_name": None}, "--run_name is missing"),
        ({"run_name": "../r"}, "--run_name"),
        ({"retokenize": "yes"}, "argument --retokenize: takes no value but true or false, not 'yes'"),
    ],
)
def test_tokenize_refuses_what_the_command_refuses(settings: dict[str, Any], message: str):
    with pytest.raises(sft.UserError, match=message.replace("?", r"\?")):
        sft.tokenize(**{"run_name": "r", "data": ["train.jsonl"]} | settings)
