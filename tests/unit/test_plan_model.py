"""What a plan knows of models and GPUs: numbers of weights as transformers counts them, GPUs by name, published runs
predicted.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import published
from sft.config.quantisation import QUANTISATIONS
from sft.families.table import architecture_of
from sft.model.build import build_stage, make_on_meta
from sft.model.collectives import SingleRank
from sft.plan.gpus import TABLE, find_gpu, read_gpus, recognise
from sft.plan.layout import Layout
from sft.plan.stage_weights import Adapters, stage_weights
from sft.plan.stages import partition
from tests.models import FAMILIES, tiny_config
from tokenize_data.errors import UserError

_LLAMA = {"model_type": "llama", "vocab_size": 32000}
REAL = {
    "Llama-2-7b": (
        6_738_415_616,
        {**_LLAMA, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    ),
    "Llama-2-70b": (
        68_976_648_192,
        {
            **_LLAMA,
            "hidden_size": 8192,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "intermediate_size": 28672,
        },
    ),
    "pythia-1b": (
        1_011_781_632,
        {
            "model_type": "gpt_neox",
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 8,
            "intermediate_size": 8192,
            "vocab_size": 50304,
        },
    ),
    "falcon-7b": (
        6_921_720_704,
        {
            "model_type": "falcon",
            "hidden_size": 4544,
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "vocab_size": 65024,
            "multi_query": True,
            "parallel_attn": True,
            "bias": False,
        },
    ),
    "opt-350m": (
        331_196_416,
        {
            "model_type": "opt",
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "ffn_dim": 4096,
            "vocab_size": 50272,
            "word_embed_proj_dim": 512,
            "do_layer_norm_before": False,
            "max_position_embeddings": 2048,
        },
    ),
    "gemma-7b": (
        8_537_680_896,
        {
            "model_type": "gemma",
            "hidden_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "intermediate_size": 24576,
            "vocab_size": 256000,
        },
    ),
    "Qwen2.5-7B": (
        7_615_616_512,
        {
            "model_type": "qwen2",
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18944,
            "vocab_size": 152064,
        },
    ),
    "Phi-3-mini": (
        3_821_079_552,
        {
            "model_type": "phi3",
            "hidden_size": 3072,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 8192,
            "vocab_size": 32064,
        },
    ),
    "OLMo-2-7B": (
        7_298_617_344,
        {
            "model_type": "olmo2",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 11008,
            "vocab_size": 100352,
        },
    ),
}


def config_file(name: str, folder: Path) -> dict[str, object]:
    """config.json as transformers writes it."""
    tiny_config(name).save_pretrained(folder)
    content: dict[str, object] = json.loads((folder / "config.json").read_text())
    return content


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_those_that_transformers_makes(name, tmp_path):
    model = make_on_meta(tiny_config(name), torch.float32)
    assert architecture_of(config_file(name, tmp_path)).num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", REAL)
def test_released_models_have_the_numbers_of_weights_that_their_cards_say(name):
    count, config = REAL[name]
    assert architecture_of(config).num_parameters == count


@pytest.mark.parametrize(
    "name", ["llama", "llama3-tied", "gemma3", "gpt-neox", "opt", "falcon", "qwen3", "phi3", "olmo2"]
)
@pytest.mark.parametrize("tp", [1, 2])
def test_each_ranks_weights_are_those_of_the_stage_that_is_built(name, tp, tmp_path):
    config, layout = tiny_config(name), Layout(tp=tp, pp=2)
    model = architecture_of(config_file(name, tmp_path))
    for stage, layers in enumerate(partition([1.0] * 4, 2)):
        built = build_stage(
            config,
            layers,
            SingleRank(size=tp),
            sequence_parallel=False,
            recompute="none",
            dtype=torch.float32,
            device=torch.device("meta"),
        )
        assert stage_weights(model, layout, stage, layers, None).base == sum(
            p.numel() for p in built.parameters.values()
        )


def test_adapters_train_little_and_four_bits_are_counted():
    model = architecture_of(REAL["Llama-2-7b"][1])
    weights = stage_weights(model, Layout(), 0, range(32), Adapters(rank=16, quantisation=QUANTISATIONS["nf4"]))
    assert weights.trained == 39_976_960  # as peft counts for all linear layers of Llama-2-7b with r=16
    assert weights.quantised == sum(linear.inputs * linear.outputs for linear in model.linears) * 32
    some = stage_weights(model, Layout(), 0, range(32), Adapters(rank=16, targets=("q_proj", "v_proj")))
    assert some.trained == 8_388_608
    assert some.quantised == 0


def test_a_config_without_a_size_is_refused():
    with pytest.raises(UserError, match=r"has no num_hidden_layers above 0"):
        architecture_of({"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 10})


def test_gpus_are_found_by_name_and_by_the_drivers_name():
    assert find_gpu("H100-80GB") is TABLE["h100-80gb"]
    assert find_gpu("a100") is TABLE["a100-80gb"]
    for name, key in (
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090-24gb"),
        ("NVIDIA RTX A6000", "a6000-48gb"),
        ("NVIDIA L40S", "l40s-48gb"),
    ):
        assert recognise(name, TABLE) is TABLE[key]
    assert recognise("Quadro K600", TABLE) is None
    assert recognise(None, TABLE) is None
    with pytest.raises(UserError, match=r"--gpu h10-80gb is not in the table: did you mean h100-80gb\?"):
        find_gpu("h10-80gb")


def test_own_gpus_are_read_and_mistakes_named(tmp_path):
    file = tmp_path / "gpus.toml"
    file.write_text('[mine]\nlike = "h100-80gb"\nmemory_gb = 64\n')
    mine = read_gpus(file)["mine"]
    assert (mine.name, mine.memory_gb, mine.bf16_tflops) == ("mine", 64, 989)
    for text, message in (
        ("[mine]\nmemory_gb = 64\n", r"\[mine\] lacks bf16_tflops, memory_gbps, link_gbps, network_gbps"),
        ('[mine]\nlike = "h100-80gb"\nmemory = 64\n', r"unknown key 'memory': did you mean 'memory_gb'"),
        ('[mine]\nlike = "h100-80gb"\nmemory_gb = "64"\n', r"memory_gb = '64' must be a number above 0"),
        ("memory_gb = 64\n", r"is outside of a table"),
        ("[mine\n", r"is not valid TOML"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_gpus(file)


def test_published_runs_are_predicted():
    """One set of constants for each kind of GPU: the median within 10 %, the worst within 20 %."""
    runs = published.read(published.ROOT / "data" / "published_runs.csv")
    errors = sorted(abs(published.compare(run).error) for run in runs)
    assert len(errors) == 13
    assert errors[len(errors) // 2] < 0.05
    assert errors[-1] < 0.10


def test_the_committed_table_is_what_the_command_writes():
    runs = published.read(published.ROOT / "data" / "published_runs.csv")
    assert (published.ROOT / "results" / "published.md").read_text() == published.table(
        [published.compare(run) for run in runs]
    )
