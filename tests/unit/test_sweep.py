"""Sweeps without training: the grid, its conditions, and a pretended trainer that fails, is stopped, or says which GPUs
it has.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sft.commands.sweep import run as run_command
from sft.config.recipe import read_recipe
from sft.plan.gpus import Device
from sft.resolve import devices
from sft.sweep import pool, results, trials
from sft.sweep.condition import holds
from sft.sweep.grid import read_sweep
from tokenize_data.errors import UserError

GRID = """
name: grid
recipe: {run_name: r, data: [a.jsonl], seq: 128}
axes:
  model: {small: {checkpoint: ./small}, big: {checkpoint: ./big, lr: 1e-5}}
  loss: [completion, full]
  samples: [60, 120]
constraints: ["samples >= 120 or loss == 'completion'"]
exclude:
  too dear: {model: big, samples: [120]}
"""
# A trainer for a few milliseconds: what it does is said by a file; it leaves what a run leaves.
TRAINER = """
import json, os, sys, time
from pathlib import Path
from sft.config.recipe import read_recipe
values = read_recipe(Path(sys.argv[1]))
run = Path(values["save_checkpoint_dir"]) / "run"
run.mkdir(parents=True, exist_ok=True)
(run / "status.json").write_text(json.dumps({"state": "running", "iteration": 1, "iterations": 1}))
with open(run / "gpus", "a") as file:
    file.write(os.environ.get("CUDA_VISIBLE_DEVICES", "all") + "\\n")
plan = Path("plan") / Path(sys.argv[1]).stem
codes = plan.read_text().split() if plan.exists() else []
time.sleep(0.2)
if codes:
    plan.write_text(" ".join(codes[1:]))
    print("it went wrong", codes[0])
    sys.exit(int(codes[0]))
records = [{"iteration": 1, "loss": 3.0, "val_loss": 2.0 + len(values["loss"])}]
records.append({"iteration": 2, "loss": 2.5, "val_loss": 4.0})
(run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\\n" for record in records))
(run / "hf").mkdir()
(run / "hf" / "model.safetensors").touch()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text(GRID)
    (tmp_path / "trainer.py").write_text(TRAINER)
    (tmp_path / "plan").mkdir()
    monkeypatch.setattr(trials, "train_command", lambda recipe: [sys.executable, "trainer.py", str(recipe)])
    return tmp_path


def sweep(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    import argparse

    from sft.commands.sweep import add_flags

    parser = argparse.ArgumentParser()
    add_flags(parser)
    capsys.readouterr()
    code = run_command(parser.parse_args(["grid.yaml", *flags]))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def table() -> dict[str, dict[str, str]]:
    with open("sweeps/grid/sweep.csv") as file:
        return {row["trial"]: row for row in csv.DictReader(file)}


def test_the_grid(folder: Path):
    found = read_sweep(folder / "grid.yaml")
    assert [trial.name for trial in found.trials] == [
        "small-completion-60",
        "small-completion-120",
        "small-full-120",
        "big-completion-60",
    ]
    assert found.left_out == {"samples >= 120 or loss == 'completion'": 2, "too dear": 2}
    names = [trial.values["run_name"] for trial in found.trials]
    assert len(set(names)) == 3
    assert names[1] == names[2]  # the loss does not change the shards
    last = found.trials[-1]
    assert (last.values["lr"], last.values["checkpoint"], last.values["seq"]) == (1e-5, "./big", 128)
    (folder / "one.yaml").write_text(last.recipe)
    assert read_recipe(folder / "one.yaml") == last.values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("axes:", "axs:"), "unknown key 'axs': did you mean 'axes'?"),
        (("samples: [60, 120]", "sampels: [60]"), "did you mean 'samples'?"),
        (("loss: [completion, full]", "loss: [completion, all]"), "use completion or full"),
        (("[60, 120]", "[]"), "has no values"),
        (("[60, 120]", "[60, 60]"), "a value is listed twice"),
        (("samples >= 120", "rows > 1"), "no axis or setting 'rows'"),
        (("samples >= 120", "__import__('os')"), "is not a condition"),
        (("samples >= 120", "samples >= 'a'"), "cannot be computed"),
        (("samples: [120]", "samples: [130]"), "exclude: too dear: samples has no value 130: it has 60, 120"),
        (("model: big,", "model: {a: 1},"), "model has no value {'a': 1}"),
        (("model: big,", "modell: big,"), "there is no axis 'modell'"),
        (("name: grid", "name: a/b"), "letters, digits"),
        (("lr: 1e-5", "lrr: 1e-5"), "axes: model: big: unknown key 'lrr'"),
        (("name: grid", "retries: -1"), "retries must be a whole number"),
        (("samples >= 120 or loss == 'completion'", "samples > 500"), "leave no trial"),
        (("name: grid", "base: no.yaml"), "No such file"),
        (("loss: [", "run: ["), "is a column of the result table"),
        (("seq: 128", "seq: {a: 1}"), "seq must be a whole number"),
    ],
)
def test_what_a_sweep_may_not_say(folder: Path, change: tuple[str, str], message: str):
    assert change[0] in GRID
    (folder / "grid.yaml").write_text(GRID.replace(*change))
    with pytest.raises(UserError) as error:
        read_sweep(folder / "grid.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "is_true"),
    [
        ("a + 1 == 3 and not b == 'x'", True),
        ("a in [1, 2]", True),
        ("1 < a < 2", False),
        ("-a < 0", True),
        ("c is None", True),
        ("b != 'y' or a % 2", False),
        ("a * 3 // 4 - 1 == 0", True),
    ],
)
def test_conditions(text: str, is_true: bool):
    assert holds(text, {"a": 2, "b": "y", "c": None}, "here") is is_true


@pytest.mark.parametrize(
    "text",
    ["a.b", "f(1)", "[x for x in a]", "a[0]", "lambda: 1", "a ** 9999", "'a' * 10**9", "a = 1", "(" * 400, "1 / 0"],
)
def test_conditions_run_nothing(text: str):
    with pytest.raises(UserError):
        holds(text, {"a": 2}, "here")


def test_a_dry_run_starts_nothing(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "grid.yaml").write_text(GRID.replace("./", "someone/"))
    code, out, _ = sweep(capsys, "--dry_run")
    assert code == 0
    assert out.count("--- ") == 4
    assert "checkpoint: someone/big" in out
    assert "left out: 2 by too dear" in out
    assert "4 trials, 1 at once; total time " in out
    assert not (folder / "sweeps").exists()


def test_failures_are_tried_again_and_finished_ones_are_not(folder: Path, capsys: pytest.CaptureFixture[str]):
    for name, codes in (
        ("small-completion-60", "3"),
        ("small-completion-120", "3 3"),
        ("small-full-120", "2"),
        ("big-completion-60", "75"),
    ):
        (folder / "plan" / name).write_text(codes)
    code, out, err = sweep(capsys)
    assert code == 3
    assert "small-completion-60: failed (exit code 3), tried again (1 of 1): it went wrong 3" in out
    assert "small-completion-120: failed (exit code 3), given up" in out
    assert "big-completion-60: stopped by a signal, saved" in out
    assert "sft sweep: small-full-120 refused: it went wrong 2" in err
    states = {name: row["state"] for name, row in table().items()}
    assert states == {
        "small-completion-60": "finished",
        "small-completion-120": "failed",
        "small-full-120": "refused",
        "big-completion-60": "finished",
    }
    assert table()["big-completion-60"]["best_val_loss"] == "4.0"
    code, out, _ = sweep(capsys)  # what was refused may have been put right; what has failed too often is left
    assert code == 3
    assert "3 of 4 trials are done already" in out
    assert "small-full-120: finished" in out
    code, out, _ = sweep(capsys, "--retry_failed")
    assert code == 0
    assert {row["state"] for row in table().values()} == {"finished"}
    assert table()["small-full-120"]["best_val_loss"] == "4.0"
    assert (
        sum(len((run / "gpus").read_text().split()) for run in folder.glob("sweeps/grid/runs/*/run")) == 2 + 3 + 2 + 2
    )
    assert (folder / "sweeps" / "grid" / "axis-loss.png").stat().st_size > 1000


@pytest.mark.parametrize("code", [0, 1])
def test_an_end_without_a_result_is_a_failure(folder: Path, capsys: pytest.CaptureFixture[str], code: int):
    """Whatever the exit code says: nothing was trained."""
    (folder / "plan" / "small-full-120").write_text(f"{code} {code}")
    exit_code, out, err = sweep(capsys)
    assert exit_code == 3
    assert (
        f"small-full-120: failed (exit code {code}), tried again (1 of 1): it ended as if finished, and left "
        "no model in "
    ) in out
    assert err.endswith(f"its last output: it went wrong {code}\n")
    assert table()["small-full-120"]["state"] == "failed"


def test_a_model_whose_weights_are_gone_is_no_result(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert sweep(capsys)[0] == 0
    run = next(folder.glob("sweeps/grid/runs/small-full-120/run"))
    (run / "hf" / "model.safetensors").unlink()
    assert sweep(capsys, "--table")[0] == 0
    assert table()["small-full-120"]["state"] == "interrupted"


def test_a_trial_that_was_killed(folder: Path, capsys: pytest.CaptureFixture[str]):
    script = (
        (folder / "trainer.py").read_text().replace("sys.exit(int(codes[0]))", "os.kill(os.getpid(), int(codes[0]))")
    )
    (folder / "trainer.py").write_text(script)
    (folder / "plan" / "small-full-120").write_text("9 9")
    assert sweep(capsys)[0] == 3
    assert table()["small-full-120"]["reason"] == "it was killed (SIGKILL): out of memory, or from outside?"


def test_several_at_once_have_gpus_of_their_own(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        devices, "installed", lambda: (tuple(Device(index=number, name="NVIDIA L4") for number in range(10)), False)
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,9")
    assert pool.make_slots(2) == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    with pytest.raises(UserError, match="--parallel 6 with 5 visible GPUs: at most 5"):
        pool.make_slots(6)
    assert sweep(capsys, "--parallel", "2")[0] == 0
    used = {(run / "gpus").read_text().strip() for run in folder.glob("sweeps/grid/runs/*/run")}
    assert used == {"4,5", "6,7"}


def test_one_trial_of_an_array(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert sweep(capsys, "--slurm")[1] == "sbatch --array=0-3 launch/sweep.sbatch grid.yaml\n"
    assert sweep(capsys, "--trial", "1")[0] == 0
    assert sweep(capsys, "--slurm", "--parallel", "2")[1] == "sbatch --array=0,2-3%2 launch/sweep.sbatch grid.yaml\n"
    with pytest.raises(UserError, match="has trials 0 to 3"):
        sweep(capsys, "--trial", "4")
    assert sweep(capsys, "--table")[0] == 0
    assert [row["state"] for row in table().values()] == ["waiting", "finished", "waiting", "waiting"]


def test_other_settings_under_the_same_name_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert sweep(capsys, "--trial", "0")[0] == 0
    (folder / "grid.yaml").write_text(GRID.replace("seq: 128", "seq: 256"))
    with pytest.raises(
        UserError, match=r"small-completion-60.yaml was run with another seq: give the sweep another name"
    ):
        sweep(capsys)


def test_scores_of_a_command_that_follows(folder: Path, capsys: pytest.CaptureFixture[str]):
    judge = (
        "import json, sys; json.dump({'f1': 0.5, 'rouge': {'l': 0.25}, 'n': 'x'}, open(sys.argv[1] + "
        "'/scores.json', 'w'))"
    )
    (folder / "judge.py").write_text(judge)
    (folder / "grid.yaml").write_text(GRID + f"after: ['{sys.executable} judge.py {{run}}']\n")
    assert sweep(capsys, "--trial", "3")[0] == 0
    row = results.rows(read_sweep(folder / "grid.yaml"))[3]
    assert (row["score_f1"], row["score_rouge_l"]) == (0.5, 0.25)
    assert "score_n" not in row


def test_words_of_a_command_after_a_trial_stay_words(folder: Path, capsys: pytest.CaptureFixture[str]):
    """No shell reads them, whatever is in the folder's name."""
    (folder / "tell.py").write_text("import json, sys\njson.dump(sys.argv[1:], open('told', 'w'))\n")
    out, words = "it's {model} $(touch canary); x", r"""{run} "a b" 'c;d' $HOME $(touch\ canary) {{run}} a\'b"""
    line = f"{sys.executable} tell.py {words}"
    (folder / "grid.yaml").write_text(
        GRID.replace("[60, 120]", "[60]").replace("samples: [120]", "samples: [60]") + f"after: {json.dumps([line])}\n"
    )
    assert sweep(capsys, "--out", out)[0] == 0
    told = json.loads(Path("told").read_text())
    assert told[0].startswith(f"{out}/runs/")
    assert told[1:5] == ["a b", "c;d", "$HOME", "$(touch canary)"]
    assert told[6] == "a'b"
    assert not list(folder.glob("**/canary"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        *((line, r"grid.yaml: after: .* is not a command") for line in ("echo 'not closed", "echo \\", "", "  ")),
        ("echo a\0b", r"grid.yaml: 'echo a\\x00b' has a NUL character: write the text again"),
    ],
)
def test_a_command_that_is_none_is_refused_before_any_trial(folder: Path, line: str, message: str):
    (folder / "grid.yaml").write_text(GRID + f"after: {json.dumps([line])}\n")
    with pytest.raises(UserError, match=message):
        read_sweep(folder / "grid.yaml")


@pytest.mark.parametrize("code", [0, 3, 75])
def test_the_array_s_script(tmp_path: Path, code: int):
    """With an `sft` and a `scontrol` that write down what they are told."""
    for name, lines in (("sft", f"echo sft $@ >> said; exit {code}"), ("scontrol", "echo scontrol $@ >> said")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_JOB_ID": "12"}
    script = Path(__file__).parents[2] / "launch" / "sweep.sbatch"
    done = subprocess.run(
        ["bash", str(script), "my sweep.yaml", "--out", "d"], cwd=tmp_path, env=environment, capture_output=True
    )
    assert done.returncode == code
    requeued = ["scontrol requeue 12_7"] if code == 75 else []
    assert (tmp_path / "said").read_text().splitlines() == ["sft sweep my sweep.yaml --out d --trial 7", *requeued]
