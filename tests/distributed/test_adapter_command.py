"""Adapters from the command line: training on several processes, on a quantised base, from an adapter; merging,
export.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.distributed.site import Site, make_site

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
# Rank x (inputs + outputs): query and output, key and value, gate, up and down, in four layers of the tiny base.
_TRAINED = 4 * 4 * (2 * (48 + 48) + 2 * (48 + 24) + 3 * (48 + 96))
_RUN = "llama-base-orders-seq256-lora4"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Site:
    return make_site(tmp_path_factory.mktemp("adapters"), smollm2)


@pytest.fixture(scope="module")
def merged(site: Site) -> Path:
    """A finished run on two processes."""
    done = site.train(
        "--iters", 3, "--lora", 4, "--lora_dropout", 0.1, "--merge_at_end", "--nproc_per_node", 2, "--tp", 2
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "adapters    rank 4 on all linear layers" in done.stdout
    assert f"trained   {_TRAINED:,} of" in done.stdout
    return site.root / "checkpoints" / _RUN


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 40)[None]).logits


def test_a_run_leaves_an_adapter_and_on_demand_a_merged_model(site: Site, merged: Path):
    base = AutoModelForCausalLM.from_pretrained(site.root / "base")
    before = _logits(base)
    after = _logits(PeftModel.from_pretrained(base, merged / "adapter"))
    assert float((after - before).abs().max()) > 1e-4
    torch.testing.assert_close(_logits(AutoModelForCausalLM.from_pretrained(merged / "hf")), after, rtol=0, atol=1e-5)
    assert json.loads((merged / "adapter" / "adapter_config.json").read_text())["target_modules"] == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    assert json.loads((merged / "hf" / "training.json").read_text())["merged"]["largest_logit_difference"] < 1e-5
    assert not [path for path in merged.iterdir() if path.name.startswith(".")]
    (step,) = merged.glob("step-*")
    held = sum(tensor.numel() for file in step.glob("*.safetensors") for tensor in load_file(file).values())
    assert held == 3 * _TRAINED  # float32 weights and two moments, of adapters alone
    again = site.train("--iters", 3, "--lora", 4)
    assert (again.returncode, "its adapter is in" in again.stderr) == (1, True)


def test_export_gives_the_adapter_of_a_checkpoint(site: Site, merged: Path):
    done = site.sft("export", merged, "--out", "exported")
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors") for folder in (merged / "adapter", site.root / "exported")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_of_adapters_is_asked_as_the_adapter(site: Site, merged: Path):
    (step,) = merged.glob("step-*")
    asked = [
        site.sft("generate", model, "--prompt", "How many?", "--max_tokens", 5) for model in (step, merged / "adapter")
    ]
    assert [done.returncode for done in asked] == [0, 0], asked[0].stderr + asked[1].stderr
    assert asked[0].stdout.splitlines()[-1] == asked[1].stdout.splitlines()[-1]
    assert not list(merged.glob(".asked-*"))


def test_training_goes_on_from_an_adapter_on_a_quantised_base(site: Site, merged: Path):
    done = site.train(
        "--iters", 2, "--adapter", merged / "adapter", "--load_in_4bit", "--dtype", "bf16", "--id", "more"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "base in 4 bits" in done.stdout
    assert "recompute full" in done.stdout
    first, more = (site.metrics(_RUN)[-1]["val_loss"], site.metrics(f"{_RUN}-more")[0]["loss"])
    assert abs(first - more) < 0.3
