"""`sft merge` on adapters that PEFT made: the same model as PEFT's own merging, a proof with it, and refusals that
explain.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from sft.checkpoint.adapter_config import CONFIG, WEIGHTS
from sft.cli import entry
from tests.models import tiny_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and a tied layer:UserWarning"),
]
_IDS = torch.arange(3, 40)[None]


def make_base(
    folder: Path, tokenizer: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **values
) -> Path:
    torch.manual_seed(0)
    config = tiny_config(family)
    config.update({"vocab_size": 49152, "num_hidden_layers": 2, **values})
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
    return folder


def make_adapter(base: Path, folder: Path, seed: int = 1, **options) -> Path:
    """With values all over, as after training."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05) if "lora" in name else parameter.data.add_(
                torch.randn_like(parameter) * 0.05
            )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", smollm2)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return make_adapter(base, base.parent / "adapter")


def merge(*arguments: object) -> int:
    return entry(["merge", *map(str, arguments)])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=_IDS).logits


def test_the_merged_model_is_that_of_peft(base: Path, adapter: Path, tmp_path: Path):
    assert merge(adapter, "--out", tmp_path / "m") == 0
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), expected, rtol=0, atol=1e-5
    )
    merged = json.loads((tmp_path / "m" / "training.json").read_text())["merged"]
    assert 0 <= merged["largest_logit_difference"] < 1e-5 < merged["largest_logit"]
    assert (merged["prompts"], merged["adapters"]) == (8, [{"folder": "adapter", "weight": 1.0, "bits": None}])
    assert (tmp_path / "m" / "tokenizer.json").is_file()


def test_several_adapters_with_weights_ranks_and_patterns(base: Path, adapter: Path, tmp_path: Path):
    patterns = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 7}}
    other = make_adapter(base, tmp_path / "other", 2, target_modules=["q_proj", "up_proj"], use_rslora=True, **patterns)
    (tmp_path / "prompts.txt").write_text("What is this?\nAnd that?\n")
    flags = ["--weights", 0.5, 2, "--prompts", tmp_path / "prompts.txt"]
    assert merge(adapter, other, "--out", tmp_path / "m", *flags) == 0
    model = AutoModelForCausalLM.from_pretrained(base)
    whole = dict(model.named_parameters())
    for folder, weight in ((adapter, 0.5), (other, 2.0)):
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        for name, module in peft.base_model.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                whole[f"{name}.weight"].data += weight * module.get_delta_weight("default").detach()
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), logits(model), rtol=0, atol=1e-5
    )
    assert json.loads((tmp_path / "m" / "training.json").read_text())["merged"]["prompts"] == 2


@pytest.mark.parametrize("words", [["embed_tokens", "lm_head"], ["lm_head"]])
def test_a_tied_head_stays_tied_unless_it_was_trained_apart(words: list[str], smollm2: Path, tmp_path: Path):
    base = make_base(tmp_path / "base", smollm2, "llama3-tied")
    adapter = make_adapter(
        base,
        tmp_path / "adapter",
        modules_to_save=words,
        target_modules=["v_proj"],
        ensure_weight_tying=len(words) == 2,
    )
    assert merge(adapter, "--out", tmp_path / "m", "--base", base) == 0
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert model.config.tie_word_embeddings == (len(words) == 2)


def test_rounding_that_loses_the_adapter_is_refused(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert merge(adapter, "--out", tmp_path / "m", "--dtype", "bf16", "--tolerance", "1e-4") == 2
    assert (
        "bf16 is too coarse for what the adapter adds; use --dtype fp32, or a larger --tolerance"
        in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())
    assert merge(adapter, "--out", tmp_path / "m", "--dtype", "bf16") == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype is torch.bfloat16


def test_a_quantised_run_is_merged_into_what_was_quantised_and_says_so(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(adapter, tmp_path / "a")
    (tmp_path / "a" / "training.json").write_text(json.dumps({"config": {"load_in_4bit": True}}))
    assert merge(tmp_path / "a", "--out", tmp_path / "m") == 0
    assert "was trained on its base in 4 bits: it is merged into the 16- or 32-bit weights" in capsys.readouterr().out
    assert json.loads((tmp_path / "m" / "training.json").read_text())["merged"]["adapters"][0]["bits"] == 4


def _changed(adapter: Path, folder: Path, **values: object) -> Path:
    shutil.copytree(adapter, folder)
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | values))
    return folder


def test_what_cannot_be_merged_is_said_with_the_remedy(
    base: Path, adapter: Path, smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    wide = make_base(tmp_path / "wide", smollm2, intermediate_size=112)
    deep = make_base(tmp_path / "shallow", smollm2, num_hidden_layers=1)
    small = make_base(tmp_path / "small", smollm2, vocab_size=49000)
    head = make_adapter(base, tmp_path / "head", target_modules=["lm_head"])
    saved = make_adapter(base, tmp_path / "saved", target_modules=["v_proj"], modules_to_save=["lm_head"])
    trained = _changed(adapter, tmp_path / "trained")
    (trained / "training.json").write_text(json.dumps({"base": "me/model", "base_fingerprint": "0" * 64}))
    empty = _changed(adapter, tmp_path / "empty")
    (empty / WEIGHTS).unlink()
    quantized = shutil.copytree(base, tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq", "bits": 4}
    }
    (quantized / "config.json").write_text(json.dumps(config))
    cases = [
        (
            [adapter, "--base", wide],
            "is for a model.layers.0.mlp.down_proj of [48, 96], the base model's is [48, 112]: give the base that",
        ),
        (
            [adapter, "--base", deep],
            "has an adapter for model.layers.1.mlp.down_proj, which this base model does not have",
        ),
        ([head, "--base", small], "is for a vocabulary of 49,152 tokens, the base model has 49,000"),
        ([saved, "--base", small], "has a vocabulary of 49,152 tokens, the base model one of 49,000"),
        ([adapter, saved, saved], "cannot be added up or weighted"),
        ([adapter, adapter, "--weights", 1], "1 --weights for 2 adapters: give one for each, or none"),
        ([trained], "was trained on me/model (fingerprint 000000000000)"),
        ([empty], "has no adapter_model.safetensors: fetch the adapter again"),
        (
            [adapter, "--base", quantized],
            "is quantised, and an adapter cannot be merged into that: name the model before quantisation with --base",
        ),
        (
            [_changed(adapter, tmp_path / "dora", use_dora=True)],
            "an adapter with use_dora = True, which is not supported",
        ),
        (
            [_changed(adapter, tmp_path / "ia3", peft_type="IA3")],
            "describes an adapter of kind IA3: only LORA is supported",
        ),
        ([tmp_path], "adapter_config.json: No such file or directory: give the folder of an adapter in PEFT's format"),
        ([adapter, "--prompts", tmp_path / "none"], "cannot be read as text"),
    ]
    for arguments, message in cases:
        assert merge(*arguments, "--out", tmp_path / "m") == 2, message
        assert message in " ".join(capsys.readouterr().err.split()), message
        assert not (tmp_path / "m").exists()
    assert merge(trained, "--any_base", "--base", base, "--out", tmp_path / "m") == 0


def test_the_folder_of_a_run_is_merged_too(base: Path, adapter: Path, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(adapter, run / "adapter")
    assert entry(["merge", str(run), "--out", str(tmp_path / "out"), "--base", str(base)]) == 0
    assert (tmp_path / "out" / "config.json").exists()
