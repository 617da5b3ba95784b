"""`sft` from the command line, on one and on four processes: files, losses, exit codes, messages."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed.site import Site, make_site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Site:
    return make_site(tmp_path_factory.mktemp("site"), smollm2)


@pytest.fixture(scope="module")
def alone(site: Site) -> str:
    """A finished run of one process."""
    done = site.train("--iters", 4, "--eval_interval", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    return "llama-base-orders-seq256"


def test_a_run_leaves_what_the_contract_names(site: Site, alone: str):
    folder = site.root / "checkpoints" / alone
    assert {"run.toml", "metrics.jsonl", "status.json", "hf", "loss.png", "report.html", "tensorboard"} <= {
        path.name for path in folder.iterdir()
    }
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert site.status(alone) | {"updated": ""} == {
        "state": "finished",
        "iteration": 4,
        "iterations": 4,
        "reason": "",
        "updated": "",
    }
    records = site.metrics(alone)
    wanted = {
        "iteration",
        "loss",
        "lr",
        "grad_norm",
        "documents",
        "tokens",
        "trained_tokens",
        "seconds",
        "tokens_per_second",
    }
    assert [record["iteration"] for record in records] == [1, 2, 3, 4]
    assert all(wanted <= record.keys() for record in records)
    assert [("val_loss" in record) for record in records] == [False, True, False, True]
    run = tomllib.loads((folder / "run.toml").read_text())
    assert run["config"]["lr"] == 1e-3
    assert run["resolved"]["iterations"] == 4
    assert "torch" in run["versions"]


def test_a_data_file_whose_name_is_not_utf8_and_files_that_only_their_owner_reads(site: Site):
    file = os.fsencode(site.root) + b"/caf\xe9.jsonl"
    shutil.copyfile(site.root / "train.jsonl", file)
    before = os.umask(0)
    try:
        done = site.sft(
            "--checkpoint",
            "base",
            "--run_name",
            "named",
            "--data",
            os.fsdecode(file),
            "--iters",
            1,
            "--global_batch",
            12,
            "--seq",
            256,
        )
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stdout + done.stderr
    run = site.root / "checkpoints" / "llama-base-named-seq256"
    modes = {
        path.name: oct(path.stat().st_mode & 0o777)
        for path in [*run.iterdir(), *(site.root / "tokenized" / "named").iterdir()]
    }
    kept = ("run.toml", "recipe.yaml", "metrics.jsonl", "status.json", "report.html", "manifest.json")
    assert {modes[name] for name in kept} == {"0o600"}
    assert {mode for name, mode in modes.items() if name.endswith((".arrow", ".jsonl", ".log", ".toml", ".html"))} == {
        "0o600"
    }, modes
    assert "caf\\udce9.jsonl" in (run / "report.html").read_text()
    assert site.sft("report", run).returncode == 0
    again = site.sft("--config", run / "recipe.yaml", "--id", "again")
    assert again.returncode == 0, again.stdout + again.stderr


def test_four_processes_give_the_same_losses_and_weights(site: Site, alone: str):
    done = site.train("--iters", 4, "--eval_interval", 2, "--id", "four", "--nproc_per_node", 4, "--tp", 2, "--pp", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "4 processes = tp 2 x pp 2 x dp 1" in done.stdout
    for one, four in zip(site.metrics(alone), site.metrics(f"{alone}-four"), strict=True):
        for key in ("loss", "grad_norm", "val_loss"):
            if key in one:
                assert four[key] == pytest.approx(one[key], rel=1e-5), (key, one["iteration"])
    one = load_file(site.root / "checkpoints" / alone / "hf" / "model.safetensors")
    four = {}
    for file in (site.root / "checkpoints" / f"{alone}-four" / "hf").glob("*.safetensors"):
        four |= load_file(file)
    assert one.keys() == four.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(four[name], tensor, rtol=0, atol=1e-5 * float(tensor.abs().max()), msg=name)


def test_the_exported_model_is_an_ordinary_folder(site: Site, alone: str):
    folder = site.root / "checkpoints" / alone / "hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "How is an order of 5 mg aspirin for surgery written?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    assert torch.isfinite(model(input_ids=ids).logits).all()
    training = json.loads((folder / "training.json").read_text())
    assert training["result"]["iterations"] == 4
    assert training["data"]
    assert training["base_fingerprint"]
    assert training["result"]["val_loss"] == site.metrics(alone)[-1]["val_loss"]


def test_the_validation_loss_is_that_of_the_exported_model(site: Site, alone: str):
    model = AutoModelForCausalLM.from_pretrained(site.root / "checkpoints" / alone / "hf", dtype=torch.float32)
    shown = site.sft("inspect", "--run_name", "orders-val", "--json")
    total, weight, right = 0.0, 0, 0
    for line in shown.stdout.splitlines():
        document = json.loads(line)
        ids, trained = torch.tensor([document["ids"]]), torch.tensor(document["trained"][1:]).bool()
        logits = model(input_ids=ids).logits[0, :-1][trained]
        targets = ids[0, 1:][trained]
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum").detach())
        right += int((logits.argmax(-1) == targets).sum())
        weight += len(targets)
    last = site.metrics(alone)[-1]
    assert last["val_loss"] == pytest.approx(total / weight, rel=1e-6)
    assert last["val_accuracy"] == pytest.approx(right / weight)


def test_a_finished_run_says_where_its_model_is(site: Site, alone: str):
    done = site.train("--iters", 4, "--eval_interval", 2)
    assert done.returncode == 1
    assert done.stderr == (
        "sft train: this run is finished: its model is in checkpoints/llama-base-orders-seq256/hf; --id NAME "
        "repeats it from scratch\n"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tp", 3, "--nproc_per_node", 3], "--tp 3 does not divide this llama model's 4 heads"),
        (
            ["--pp", 5, "--nproc_per_node", 5],
            "--pp 5 is more stages than the 4 layers of this llama model: use --pp 1 to 4",
        ),
        (
            ["--nproc_per_node", 5],
            "global_batch 12 is not divisible by dp 5: use dp 1, 2, 3, 4, 6, 12, or a global_batch of 5, 10, ...",
        ),
        (["--tp", 2, "--nproc_per_node", 3], "tp 2 x pp 1 needs a multiple of 2 processes, but 3 would start"),
        (
            ["--no_autoaccept_iters"],
            "there is no terminal: ceil(3 epochs x 50 documents / 12) = 13 iterations; accept it with",
        ),
        (["--zero", 3], "unrecognized arguments: --zero 3"),
        (["--schedule", "cosin"], "--schedule cosin: use one of cosine, linear, constant"),
    ],
)
def test_what_cannot_be_is_said_before_any_process_starts(site: Site, alone: str, flags: list, message: str):
    done = site.train(*flags, "--id", "refused")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (site.root / "checkpoints" / f"{alone}-refused").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_that_is_no_number_stops_before_the_update(site: Site, alone: str, processes: int):
    poisoned = site.root / "poisoned"
    if not poisoned.exists():
        shutil.copytree(site.root / "base", poisoned)
        weights = load_file(poisoned / "model.safetensors")
        weights["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
        save_file(weights, poisoned / "model.safetensors", metadata={"format": "pt"})
    done = site.train(
        "--checkpoint", "poisoned", "--iters", 4, "--nproc_per_node", processes, "--id", f"nan{processes}"
    )
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "the loss is not a finite number in iteration 1, which was not applied; documents " in done.stderr
    assert "train.jsonl line " in done.stderr
    status = site.status(f"llama-poisoned-orders-seq256-nan{processes}")
    assert status["state"] == "failed"
    assert "iteration 1" in status["reason"]
    assert not (site.root / "checkpoints" / f"llama-poisoned-orders-seq256-nan{processes}" / "hf").exists()


@pytest.mark.parametrize(
    ("answers", "code", "iterations"), [("maybe\n2\n", 0, 2), ("n\n", 0, None)], ids=["number", "no"]
)
def test_iterations_are_shown_and_asked_for(site: Site, alone: str, answers: str, code: int, iterations: int | None):
    run = f"asked{iterations}"
    fixed = [
        "--checkpoint",
        "base",
        "--run_name",
        "orders",
        "--global_batch",
        "12",
        "--seq",
        "256",
        "--no_autoaccept_iters",
        "--id",
        run,
    ]
    found, shown = _on_a_terminal([sys.executable, "-m", "sft", *fixed], site, answers)
    assert found == code
    assert "Accept 13 iterations? [y/n/number]" in shown
    folder = site.root / "checkpoints" / f"{alone}-{run}"
    assert folder.exists() == (iterations is not None)
    if iterations is not None:
        assert shown.count("Accept 13 iterations?") == 2
        assert len(site.metrics(folder.name)) == iterations


def test_torchrun_starts_workers_too(site: Site, alone: str):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "sft"]
    command += [
        "--checkpoint",
        "base",
        "--run_name",
        "orders",
        "--data",
        "train.jsonl",
        "--global_batch",
        "12",
        "--lr",
        "1e-3",
    ]
    command += [
        "--seq",
        "256",
        "--iters",
        "2",
        "--id",
        "torchrun",
        "--tokenized_data_dir",
        "fresh",
    ]  # rank 1 waits for rank 0's shards
    done = subprocess.run(command, cwd=site.root, env=site.environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert site.metrics(f"{alone}-torchrun")[0]["loss"] == pytest.approx(site.metrics(alone)[0]["loss"], rel=1e-6)


def _on_a_terminal(
    command: list[str], site: Site, answers: str, read: Callable[[int, int], bytes] = os.read
) -> tuple[int, str]:
    """(exit code, what was shown) of a command whose input and output are a terminal."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(site.root)
        os.execve(command[0], command, site.environment())
    os.write(terminal, answers.encode())
    shown = b""
    while True:
        try:
            part = read(terminal, 65536)
        except OSError:  # the other end was closed
            break
        if not part:
            break
        shown += part
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), shown.decode(errors="replace")
