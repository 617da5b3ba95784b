"""`sft parity`: a small model of a base's shape, and the base's own weights on the user's rows, against
transformers.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.site import Site, make_site
from tests.models import tiny_config

_WRONG = (
    "import sys; from sft.model import parts; right = parts.Head.normalised; "
    "parts.Head.normalised = lambda self, hidden: right(self, hidden) * 1.02; from sft.cli import entry; "
    "sys.exit(entry(sys.argv[1:]))"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Site:
    made = make_site(tmp_path_factory.mktemp("parity"), smollm2)
    command = ["-m", "tokenize_data", "--run_name", "orders", "--checkpoint", "base", "--data", "train.jsonl"]
    subprocess.run(
        [sys.executable, *command], cwd=made.root, env=made.environment(), check=True, capture_output=True, timeout=600
    )
    return made


@pytest.mark.parametrize(("dtype", "layout"), [("fp32", ()), ("bf16", ("--tp", "2"))])
def test_the_bases_own_weights_on_the_users_rows(site: Site, dtype: str, layout: tuple[str, ...]):
    done = site.sft(
        "parity", "--checkpoint", "base", "--weights", "--rows", 9, "--run_name", "orders", "--dtype", dtype, *layout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].endswith(f"{'float32' if dtype == 'fp32' else 'bfloat16'} on cpu, 9 documents")
    assert [line.split()[0] for line in lines[3:5]] == ["loss", "gradient"]
    assert "gradient of (the 5 worst of 38)" in lines[6]
    assert lines[-1] == "the same within what rounding explains"


@pytest.mark.parametrize("tp", [1, 2])
def test_sums_over_the_tokens_of_a_packed_row_in_bfloat16(site: Site, smollm2: Path, tp: int):
    """Gradients of LayerNorm's biases, which torch's own kernel sums in bfloat16 on a CPU."""
    base = site.root / "neox"
    if not base.exists():
        config = tiny_config("gpt-neox")
        config.update({"vocab_size": 49152, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0})
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(base)
        for file in smollm2.iterdir():
            shutil.copy(file, base)
    compared = ["--checkpoint", "neox", "--weights", "--rows", 9, "--run_name", "orders", "--dtype", "bf16"]
    done = site.sft("parity", *compared, "--tp", tp)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "the same within what rounding explains"


def test_a_model_that_computes_something_else_is_told_with_exit_code_3(site: Site):
    flags = ["parity", "--checkpoint", "base", "--weights", "--rows", "9", "--run_name", "orders"]
    command = [sys.executable, "-c", _WRONG, *flags]
    done = subprocess.run(command, cwd=site.root, env=site.environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("NOT the same within what rounding explains; ")
    assert "gradients are off by more" in done.stdout


def test_a_small_model_in_bfloat16(site: Site):
    done = site.sft("parity", "--checkpoint", "base", "--dtype", "bf16", "--iters", 2, "--pp", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(
        "LlamaForCausalLM, tp 1 x pp 2 x dp 1, bfloat16 on the CPU, against plain transformers\n"
    )
    assert done.stdout.endswith("the same within 1e-03 (losses), 1e-02 (norms) and 2e-01 (updates)\n")


def test_what_is_missing_is_said(site: Site):
    for flags, message in (
        (["--weights"], "--weights compares on rows of a data set: name it with --run_name, or leave --weights out"),
        (["--rows", "0"], "--rows 0 must be at least 1"),
    ):
        done = site.sft("parity", "--checkpoint", "base", *flags)
        assert (done.returncode, done.stderr) == (2, f"sft parity: {message}\n")
