"""However a run with adapters is laid out, it computes what PEFT computes on one process, and PEFT reads what it
writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.distributed import adapters, plain, worker
from tests.distributed.launch import Died, results_of, run_chosen
from tests.models import FAMILIES

# PEFT uses what transformers renames, and warns of tied layers, which the adapter has both of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and a tied layer:UserWarning"),
]

TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-4  # As gradients are tiny at first, for B is zero, and Adam makes steps of one size of them
SHORT: dict[str, Any] = {"kind": "adapters", "layers": 2, "iterations": 4, "lora": {}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {"recompute": "selective"},
    "pp2 x dp2, unpacked": {"pp": 2, "dp": 2, "pack": False, "val_documents": 5},
    "tp2 x pp2, stretches": {"tp": 2, "pp": 2, "sequence_parallel": True, "loss_mask": 0.5, "recompute": "full"},
    "tp2 x dp2": {"tp": 2, "dp": 2},
}
ALL_FAMILIES = sorted(FAMILIES)
CORE = ("llama", "gpt-neox", "opt", "gemma")
VARIANTS: dict[str, dict[str, Any]] = {
    "llama: tp4": {"family": "llama", "tp": 4},
    "llama: pp2 x dp2, one stage trains nothing": {
        "family": "llama",
        "pp": 2,
        "dp": 2,
        "lora": {"targets": ["lm_head"]},
    },
    "llama: tp2 x dp2, head": {
        "family": "llama",
        "tp": 2,
        "dp": 2,
        "sequence_parallel": True,
        "lora": {"targets": ["lm_head", "q_proj"]},
    },
    "llama: embedding, head, norms": {
        "family": "llama",
        "tp": 2,
        "pp": 2,
        "lora": {"modules_to_save": ["embed_tokens", "lm_head", "model.norm"], "targets": ["v_proj"]},
    },
    "llama3-tied: embedding": {
        "family": "llama3-tied",
        "tp": 2,
        "pp": 2,
        "lora": {"modules_to_save": ["embed_tokens"]},
    },
    "llama3-tied: rank-stabilised": {"family": "llama3-tied", "pp": 2, "dp": 2, "lora": {"is_rank_stabilised": True}},
    "llama: 8 bits": {"family": "llama", "tp": 2, "pp": 2, "bits": 8},
}


def _cases() -> dict[str, dict[str, Any]]:
    cases = {}
    for family in ALL_FAMILIES:
        for layout, facts in LAYOUTS.items():
            cases[f"{family}: {layout}"] = {**SHORT, "family": family, **facts}
            if family in CORE:
                cases[f"{family}: {layout}, 4 bits"] = {**SHORT, "family": family, "bits": 4, **facts}
    for case in cases.values():
        if case.get("bits") == 4:  # whole blocks of 64 in a row, which bitsandbytes' own layers need on the CPU
            case["sizes"] = {"hidden_size": 64, ("ffn_dim" if case["family"] == "opt" else "intermediate_size"): 128}
            case["sizes"] |= {"word_embed_proj_dim": 64} if case["family"] == "opt" else {"head_dim": 16}
    return cases | {name: {**SHORT, **facts} for name, facts in VARIANTS.items()}


DROPPING = {"family": "llama", "lora": {"dropout": 0.3}}
DROPOUT: dict[str, dict[str, Any]] = {
    "dropout: one": {**DROPPING, "recompute": "full"},
    "dropout: tp2 x pp2, stretches": {
        **DROPPING,
        "tp": 2,
        "pp": 2,
        "sequence_parallel": True,
        "recompute": "selective",
        "micro_batch": 1,
    },
    "dropout: pp2 x dp2, unpacked": {**DROPPING, "pp": 2, "dp": 2, "pack": False},
}
CASES = _cases() | {name: {**SHORT, **facts} for name, facts in DROPOUT.items()}
# The rest is a long proof.
IN_CI = {
    *VARIANTS,
    "llama: one, 4 bits",
    "llama: tp2 x pp2, stretches",
    "gpt-neox: tp2 x pp2, stretches",
    "opt: tp2 x dp2",
    "gemma: tp2 x pp2, stretches, 4 bits",
}
PARAMETERS = [
    pytest.param(name, marks=() if name in IN_CI else (pytest.mark.slow,)) for name in CASES if name not in DROPOUT
]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any] | Died]:
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "tokenizer.json").write_text("{}")
    for number, case in enumerate(CASES.values()):
        case |= {"out": str(folder / f"adapter-{number}"), "tokenizer": str(folder)}
    return run_chosen(request, CASES, folder)


@pytest.mark.timeout(3600)  # the first of them waits for all
@pytest.mark.parametrize("name", PARAMETERS)
def test_adapters_train_as_with_peft(name, results):
    torch.set_num_threads(1)
    case, ranks = CASES[name], results_of(results[name])
    for rank in ranks:
        assert "refusal" not in rank, rank["refusal"]
    dense = _dense(case, ranks)
    model = adapters.peft_model(case, dense)
    records, weights, validation = adapters.train_with_peft(model, case)
    for rank in ranks:
        torch.testing.assert_close(torch.tensor(rank["records"]), torch.tensor(records), rtol=TOLERANCE, atol=0.0)
        assert rank["validation"]["val_loss"] == pytest.approx(validation["val_loss"], rel=TOLERANCE)
    written = {
        key.removeprefix("base_model.model."): value
        for key, value in load_file(Path(case["out"], "adapter_model.safetensors")).items()
    }
    tied = {"lm_head.weight"} if worker.config_of(case).tie_word_embeddings else set()
    assert written.keys() - tied == weights.keys() - tied
    for key, found in written.items():
        expected = weights.get(key, weights.get("model.embed_tokens.weight"))
        assert float((found - expected).abs().max() / expected.abs().max()) <= WEIGHT_TOLERANCE, key
    _compare_logits(case, model, dense)


@pytest.mark.parametrize(("one", "other"), [("dropout: one", name) for name in DROPOUT if name != "dropout: one"])
def test_the_same_is_dropped_on_every_layout_and_with_peft(one, other, results):
    (alone,), ranks = results_of(results[one]), results_of(results[other])
    for rank in ranks:
        torch.testing.assert_close(
            torch.tensor(rank["records"]), torch.tensor(alone["records"]), rtol=TOLERANCE, atol=0.0
        )
    records, *_ = adapters.train_with_peft(adapters.peft_model(CASES[one]), CASES[one])
    torch.testing.assert_close(torch.tensor(alone["records"]), torch.tensor(records), rtol=TOLERANCE, atol=0.0)
    without = {**CASES[one], "lora": {}}
    records, *_ = adapters.train_with_peft(adapters.peft_model(without), without)
    assert abs(records[-1][0] - alone["records"][-1][0]) > 1e-4  # and something is dropped


def _dense(case: dict[str, Any], ranks: list[Any]) -> dict[str, torch.Tensor] | None:
    """What the ranks' quantised slices mean, put together. None where PEFT can quantise for itself: then the whole is
    one slice.
    """
    if "bits" not in case or (case["bits"] == 4 and case.get("tp", 1) == 1):
        return None
    wholes = {
        name: parameter.detach().clone()
        for name, parameter in plain.make_model(worker.config_of(case)).named_parameters()
    }
    originals, quantized = {name: whole.clone() for name, whole in wholes.items()}, set()
    for rank in ranks:
        for name, (part, values) in rank["quantized"].items():
            quantized.add(name)
            part.put(wholes[name], values) if part else wholes[name].copy_(values)
    assert quantized
    for name in quantized:
        assert 0 < float((wholes[name] - originals[name]).abs().max()) < 0.17 * float(originals[name].abs().max())
    return {name: wholes[name] for name in quantized}


def _compare_logits(case: dict[str, Any], trained: Any, dense: dict[str, torch.Tensor] | None) -> None:
    """The adapter as PEFT reads it, on the same base."""
    base = (
        adapters.peft_model(case, dense).unload() if case.get("bits") == 4 else plain.make_model(worker.config_of(case))
    )
    for name, weight in (dense or {}).items():
        base.get_parameter(name).data.copy_(weight)
    ids = torch.arange(3, 33)[None]
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base, case["out"]).eval()
        torch.testing.assert_close(
            loaded(input_ids=ids).logits, trained.eval()(input_ids=ids).logits, rtol=0.0, atol=1e-4
        )
