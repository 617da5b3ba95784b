"""The commands on a GPU: training in every way, stopping and resuming, and the result in plain transformers."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.distributed.site import Site, make_site

BF16 = 2.0**-7  # of a loss: its last bits and those of the logits


@pytest.fixture
def site(tmp_path: Path, smollm2: Path) -> Site:
    return make_site(tmp_path, smollm2, hidden_size=64, intermediate_size=128)


def _losses(site: Site, run: str) -> list[float]:
    return [record["loss"] for record in site.metrics(run)]


def _only_run(site: Site) -> str:
    (run,) = (path.name for path in (site.root / "checkpoints").iterdir() if path.is_dir())
    return run


def _loss_in_transformers(site: Site, folder: Path) -> float:
    """The mean loss of the answers of the validation set, with transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total = count = 0.0
    for line in (site.root / "val.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = [{"role": "user", "content": row["prompt"]}]
        whole = tokenizer.apply_chat_template(
            [*prompt, {"role": "assistant", "content": row["gold"]}], tokenize=True, return_dict=True
        )["input_ids"]
        begin = tokenizer.apply_chat_template(prompt, tokenize=True, add_generation_prompt=True, return_dict=True)
        ids = torch.tensor([whole], device="cuda")
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        start = len(begin["input_ids"]) - 1
        text = tokenizer.decode(whole)
        last = len(whole) - 2 if text.endswith("\n") else len(whole) - 1  # the end of turn is trained, its newline not
        total += float(nll[start:last].sum())
        count += last - start
    return total / count


def test_full_training_and_its_model_in_transformers(site: Site):
    done = site.train("--epochs", 3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not compiled" not in done.stdout + done.stderr, done.stdout + done.stderr
    run = _only_run(site)
    losses = _losses(site, run)
    assert losses[-1] < losses[0]
    last = [record["val_loss"] for record in site.metrics(run) if "val_loss" in record][-1]
    found = _loss_in_transformers(site, site.root / "checkpoints" / run / "hf")
    assert abs(found - last) < BF16 * last, (found, last)


def test_compiled_layers_and_layers_as_written_learn_the_same(site: Site):
    for name, flag in (("auto", "auto"), ("off", "off")):
        done = site.train("--epochs", 2, "--compile", flag, "--id", name)
        assert done.returncode == 0, done.stdout + done.stderr
    runs = sorted(path.name for path in (site.root / "checkpoints").iterdir() if path.is_dir())
    compiled, written = (_losses(site, run) for run in runs)
    assert compiled == pytest.approx(written, rel=BF16)


@pytest.mark.parametrize("flags", [["--lora", "8"], ["--lora", "8", "--load_in_4bit"]], ids=["adapters", "4 bits"])
def test_adapters(site: Site, flags: list[str]):
    if "--load_in_4bit" in flags and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    done = site.train("--epochs", 3, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = _losses(site, _only_run(site))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_a_run_that_is_stopped_goes_on_where_it_was(site: Site, optimizer: str):
    command = [sys.executable, "-m", "sft", "--checkpoint", "base", "--run_name", "orders", "--data", "train.jsonl"]
    command += ["--global_batch", "12", "--lr", "1e-3", "--seq", "256", "--epochs", "60", "--optimizer", optimizer]
    with subprocess.Popen(command, cwd=site.root, env=site.environment(), stdout=subprocess.PIPE, text=True) as run:
        try:
            deadline = time.monotonic() + 200
            while time.monotonic() < deadline and run.poll() is None:
                files = list((site.root / "checkpoints").glob("*/metrics.jsonl"))
                if files and len(files[0].read_text().splitlines()) >= 5:
                    break
                time.sleep(0.1)
            run.send_signal(signal.SIGTERM)
            assert run.wait(120) == 75
        finally:
            run.kill()
    name = _only_run(site)
    before = len(_losses(site, name))
    assert 5 <= before < 240
    done = subprocess.run(command, cwd=site.root, env=site.environment(), capture_output=True, text=True, timeout=230)
    assert done.returncode == 0, done.stdout + done.stderr
    records = site.metrics(name)
    assert [record["iteration"] for record in records] == list(range(1, len(records) + 1))
    assert records[before]["loss"] == pytest.approx(records[before - 1]["loss"], rel=0.2)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_base_on_the_users_rows_against_transformers(site: Site, dtype: str):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tokenize_data",
            "--run_name",
            "orders",
            "--checkpoint",
            "base",
            "--data",
            "train.jsonl",
        ],
        cwd=site.root,
        env=site.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    flags = ["--checkpoint", "base", "--weights", "--rows", 9, "--run_name", "orders", "--dtype", dtype]
    done = site.sft("parity", *flags)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " on cuda" in done.stdout.splitlines()[0]


def test_the_plan_knows_the_gpu(site: Site):
    done = site.sft("plan", "--checkpoint", "base", "--run_name", "orders", "--data", "train.jsonl")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    name = torch.cuda.get_device_name()
    kind = next(kind for kind in ("h200", "h100", "a100", "") if kind in name.lower())
    assert kind in done.stdout.lower(), (name, done.stdout)


def test_answers_of_the_trained_model(site: Site):
    assert site.train("--epochs", 1).returncode == 0
    run = _only_run(site)
    done = site.sft("generate", f"checkpoints/{run}/hf", "--prompt", "How is an order written?")
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
