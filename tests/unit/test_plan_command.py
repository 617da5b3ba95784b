"""`sft plan` and `--plan_only`: what they print, from how little, and that training takes what the plan says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft.cli import entry
from sft.config.settings import Settings
from sft.plan.gpus import TABLE
from sft.resolve import planning
from sft.resolve.question import RunFacts
from sft.resolve.run import resolve
from sft.resolve.summary import facts_of
from tests.conftest import Workbench, pair
from tests.unit.test_plan_search import LLAMA_8B, LLAMA_70B
from tokenize_data.errors import UserError

_BLOCKED = """
import sys
for name in ("torch", "transformers", "deepspeed", "peft"):
    sys.modules[name] = None
from sft.cli import entry
sys.exit(entry(sys.argv[1:]))
"""
CLUSTER = ["--gpu", "h100-80gb", "--nodes", "2", "--nproc_per_node", "8"]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_config(tmp_path / "llama8b", LLAMA_8B)


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Any:
    capsys.readouterr()
    assert entry([str(argument) for argument in ("plan", *arguments, "--json")]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_config_file_alone_is_enough_and_torch_is_not_needed(llama, tmp_path):
    command = [
        sys.executable,
        "-c",
        _BLOCKED,
        "plan",
        "--checkpoint",
        str(llama),
        *CLUSTER,
        "--iters",
        "100",
        "--explain",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    for text in (
        "llama8b (llama), 8.03B parameters",
        "16 x h100-80gb, 79.1 GB each",
        "100, as given",
        "sequence parallel",
        "micro-batches",
        "MFU",
        "GPU-hours",
        "activations",
        "chosen",
        "slower",
        "= 8,030,261,248",
        "2^30 bytes",
    ):
        assert text in done.stdout, done.stdout
    assert list(tmp_path.iterdir()) == [llama]  # nothing is written


def test_json_holds_what_the_page_shows(llama, capsys):
    plan = plan_json(capsys, "--checkpoint", llama, *CLUSTER, "--iters", 50, "--recompute", "full")
    assert plan["parameters"] == 8_030_261_248
    assert plan["tp"] * plan["pp"] * plan["dp"] == plan["gpus"] == 16
    assert plan["recompute"] == "full"
    assert sum(plan["layers"]) == 32
    assert plan["hours"] == pytest.approx(50 * plan["seconds_per_iteration"] / 3600)
    assert plan["gpu_hours"] == pytest.approx(16 * plan["hours"])
    assert plan["seconds_per_iteration"] == pytest.approx(sum(plan["seconds"].values()))
    assert plan["peak_bytes"] == max(stage["total"] for stage in plan["memory"]) <= plan["usable_bytes"]
    assert plan["communicators"] * 0.5 + 1 + 0.03 * 79.1 == pytest.approx(79.1 - plan["usable_bytes"] / 2**30, abs=1e-6)
    assert plan["checkpoint_bytes"] == 12 * plan["parameters"]
    assert [choice["seconds_per_iteration"] for choice in plan["choices"]] == sorted(
        choice["seconds_per_iteration"] for choice in plan["choices"]
    )
    assert len(plan["choices"]) == 5


def test_plan_only_is_the_same(llama, capsys):
    arguments = ["--checkpoint", str(llama), "--run_name", "r", *CLUSTER, "--iters", "5"]
    assert entry(["plan", *arguments]) == 0
    page = capsys.readouterr().out
    assert entry(["train", *arguments, "--plan_only"]) == 0
    assert capsys.readouterr().out == page
    assert entry([*arguments, "--plan_only"]) == 0
    assert capsys.readouterr().out == page


def test_without_shards_rows_are_counted_or_known_ahead(llama, capsys, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": "x" * 360, "gold": "y" * 13}) + "\n" for _ in range(1000)))
    plan = plan_json(capsys, "--checkpoint", llama, *CLUSTER, "--data", data, "--run_name", "r")
    assert (plan["documents"], plan["iterations"], plan["data_source"]) == (1000, 47, "rows of the files")
    assert plan["tokens_per_iteration"] == 64 * 99  # documents of 400 bytes are taken for 100 tokens
    table = tmp_path / "known.toml"
    table.write_text(f'[base.8]\npath = "{llama}"\ntp = 8\npp = 1\n[documents]\nr = 2000\n')
    plan = plan_json(capsys, "--checkpoint", llama, *CLUSTER, "--run_name", "r", "--checkpoints_file", table)
    assert (plan["documents"], plan["iterations"]) == (2000, 94)
    unknown = plan_json(capsys, "--checkpoint", llama, *CLUSTER)
    assert unknown["iterations"] is None
    assert any("how many documents there are is not known" in note for note in unknown["notes"])


def test_what_if_shows_other_numbers_of_gpus(llama, capsys, tmp_path):
    plot = tmp_path / "scaling.png"
    assert (
        entry(
            [
                "plan",
                "--checkpoint",
                str(llama),
                *CLUSTER,
                "--iters",
                "9",
                "--what_if",
                "gpus=8,16,32",
                "--plot",
                str(plot),
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert all(word in text for word in ("efficiency", "100%", "8", "16", "32", "tp"))
    assert plot.read_bytes().startswith(b"\x89PNG")
    speeds = [
        row["tokens_per_second"]
        for row in plan_json(capsys, "--checkpoint", llama, *CLUSTER, "--what_if", "gpus=8,16,32")
    ]
    assert speeds == sorted(speeds)
    assert entry(["plan", "--checkpoint", str(llama), *CLUSTER, "--what_if", "16,32"]) == 2
    assert "--what_if 16,32: write it as gpus=16,32,64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu", "h101"], r"--gpu h101 is not in the table"),
        (["--tp", "3"], r"tp 3 x pp 1 needs a multiple of 3 processes"),
        (
            ["--load_in_4bit"],
            r"--load_in_4bit freezes the base weights, so full fine-tuning is not possible: add --lora 16",
        ),
        (
            ["--micro_batch", "64", "--recompute", "none", "--tp", "1"],
            r"does not fit: \d+ GB on stage \d of 79.1 GB .*; fits with --",
        ),
        (["--data", "missing.jsonl"], r"--data missing.jsonl: No such file"),
    ],
)
def test_mistakes_are_one_line(flags, message, llama, capsys):
    code = entry(["plan", "--checkpoint", str(llama), *CLUSTER, *flags])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_a_model_that_is_not_here_is_not_fetched(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert entry(["plan", "--checkpoint", "someone/some-model-of-theirs", *CLUSTER]) == 2
    assert (
        "has not been fetched to this machine; its configuration is enough: hf download someone/some-model"
        in capsys.readouterr().err
    )


@pytest.fixture
def tokenised(bench: Workbench, tmp_path: Path) -> Settings:
    """A data set, and a base model of which all is there but the weights' numbers."""
    bench.tokenize("--data", bench.jsonl([pair(f"Number {i}?", f"It is {i}.") for i in range(80)]))
    return Settings.of(
        run_name="r",
        tokenized_data_dir=str(bench.tokenized),
        checkpoint=str(bench.base),
        save_checkpoint_dir=str(tmp_path),
    )


class BaseStub:
    """What `resolve` needs of a base model."""

    family, is_entry, num_parameters, fingerprint = "llama", False, 8_030_261_248, "x"

    def __init__(self, config: dict[str, Any], **entry: int) -> None:
        self.config, self.folder = config, Path()
        self.entry = type("Entry", (), {"name": "base", "path": "base", "tp": None, "pp": None, **entry})()


def test_training_takes_the_first_of_the_plan(tokenised, monkeypatch):
    monkeypatch.setattr(planning, "visible_gpus", lambda: 8)
    monkeypatch.setattr("sft.resolve.run.visible_gpus", lambda: 8)
    monkeypatch.setattr("sft.resolve.summary.visible_gpus", lambda: 8)
    monkeypatch.setattr(planning, "local_gpu", lambda table: TABLE["h100-80gb"])
    base: Any = BaseStub(LLAMA_8B)
    job = resolve(tokenised, base)
    reader = job.data.open()
    case = RunFacts(
        settings=tokenised,
        base=base,
        world=8,
        gpu=TABLE["h100-80gb"],
        pack=lambda _: planning.batches_of(reader, job.sampler),
        trained_share=planning.trained_share(tokenised, reader),
    )
    question = case.question().question
    choice = planning.best(question)
    assert (job.layout, job.micro_batch, job.recompute, job.dtype) == (
        choice.layout,
        choice.micro_batch,
        choice.recompute,
        "bf16",
    )
    assert list(job.stages) == list(choice.ranges)
    expected = facts_of(job).expected_seconds
    assert expected == pytest.approx(job.iterations * choice.seconds.total)
    large: Any = BaseStub(LLAMA_70B)
    with pytest.raises(UserError, match=r"does not fit: .* no layout on 8 fits: \d+ GPUs do") as refused:
        resolve(tokenised.replace(tp=1, pp=1), large)
    assert "of 79.1 GB" in str(refused.value)


def test_on_gpus_that_nobody_knows_training_is_as_simple_as_it_was(tokenised, monkeypatch):
    monkeypatch.setattr(planning, "visible_gpus", lambda: 2)
    monkeypatch.setattr("sft.resolve.run.visible_gpus", lambda: 2)
    monkeypatch.setattr("sft.resolve.summary.visible_gpus", lambda: 2)
    monkeypatch.setattr(planning, "local_gpu", lambda table: None)
    base: Any = BaseStub(LLAMA_8B)
    job = resolve(tokenised, base)
    assert (str(job.layout), job.micro_batch, job.recompute) == ("tp 1 x pp 1 x dp 2", 4, "none")
    assert facts_of(job).expected_seconds is None


def test_on_the_cpu_what_is_simplest_is_taken_until_memory_is_short(tokenised, monkeypatch):
    base: Any = BaseStub(
        LLAMA_8B | {"num_hidden_layers": 12, "hidden_size": 512, "intermediate_size": 1024, "vocab_size": 49152}
    )
    job = resolve(tokenised, base)
    assert (str(job.layout), job.micro_batch, job.recompute, job.dtype) == ("tp 1 x pp 1 x dp 1", 1, "none", "fp32")
    assert facts_of(job).expected_seconds is not None
    chosen = []
    for gigabytes in np.arange(1.0, 5.0, 0.05):
        monkeypatch.setattr(planning, "_memory_bytes", lambda size=gigabytes: int(size * 1e9))
        chosen.append(planning.choose(tokenised, base, job.data.open(), 1).recompute)
    assert (chosen[0], chosen[-1]) == ("full", "none")
    order = ["full", "selective", "none"]
    assert chosen == sorted(chosen, key=order.index)
    assert set(chosen) == set(order)


def test_an_adapter_to_go_on_from_says_its_rank(llama, capsys, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    plan = plan_json(capsys, "--checkpoint", llama, *CLUSTER, "--adapter", tmp_path, "--load_in_4bit")
    assert (
        plan["trained_parameters"]
        == plan_json(capsys, "--checkpoint", llama, *CLUSTER, "--lora", 8)["trained_parameters"]
    )
    assert entry(["plan", "--checkpoint", str(llama), *CLUSTER, "--adapter", str(llama)]) == 2
    assert "adapter_config.json does not say a rank" in capsys.readouterr().err


def test_a_gguf_file_is_not_converted_for_a_plan(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert entry(["plan", "--checkpoint", str(file), *CLUSTER]) == 2
    assert "has not been converted yet, which the first training with it does" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "largest"),
    [
        ("num_hidden_layers", 10**8, "1,000"),
        ("num_hidden_layers", -1, "1,000"),
        ("num_hidden_layers", "many", "1,000"),
        ("hidden_size", 1.5, "1,048,576"),
        ("num_attention_heads", 0, "65,536"),
        ("num_key_value_heads", True, "65,536"),
        ("vocab_size", 4 * 10**9, "67,108,864"),
        ("head_dim", 10**12, "65,536"),
    ],
)
@pytest.mark.parametrize("command", [["plan", *CLUSTER], ["train", "--run_name", "r", "--data", "d.jsonl"]])
def test_sizes_of_no_model_are_refused_before_anything_is_built(tmp_path, capsys, command, name, value, largest):
    folder = write_config(tmp_path / "hostile", {**LLAMA_8B, name: value})
    for file in ("tokenizer.json", "model.safetensors") if command[0] == "train" else ():
        (folder / file).write_text("{}")
    assert entry([*command, "--checkpoint", str(folder), "--iters", "10"]) == 2
    assert capsys.readouterr().err.endswith(
        f"{folder}/config.json: {name} is {value!r}, not a number from 1 to {largest}: fetch the base model again\n"
    )


@pytest.mark.parametrize("command", [["generate", "--prompt", "Is it?"], ["parity", "--checkpoint"]])
def test_nor_is_such_a_model_loaded(tmp_path, capsys, smollm2, command):
    folder = write_config(tmp_path / "hostile", {**LLAMA_8B, "num_hidden_layers": 10**8})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((smollm2 / file).read_bytes())
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    arguments = [command[0], str(folder), *command[1:]] if command[0] == "generate" else [*command, str(folder)]
    assert entry(arguments) == 2
    assert "/config.json: num_hidden_layers is 100000000, not a number from 1 to 1,000" in capsys.readouterr().err
