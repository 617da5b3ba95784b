"""Training of adapters: what each process of a test runs, and PEFT on one process, which it is compared with."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from sft.model.lora import LoraSettings, initial
from sft.plan.sampler import Sampler
from tests.distributed import plain, worker
from tests.distributed.data import MemoryReader

SEED = 11
RANK = 4


def settings_of(case: dict[str, Any]) -> LoraSettings:
    given = {"rank": RANK, "alpha": 12.0, "seed": SEED, **case.get("lora", {})}
    return LoraSettings(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def train_adapters(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """As `worker.train_and_validate`. The adapter is written to `case["out"]` at the end."""
    from sft.checkpoint.adapter import AdapterOrigins, adapter_config_of, write_adapter

    result = worker.train_and_validate(case, device)
    run = result.pop("run")
    trained = {name for name, parameter in run.built.parameters.items() if parameter.requires_grad}
    result["weights"] = {name: found for name, found in result["weights"].items() if name in trained}
    result["quantized"] = {
        name: (run.built.places[name].part, weight.whole()) for name, weight in run.built.quantized.items()
    }
    result["gradients"] = [name for name, parameter in run.built.parameters.items() if parameter.grad is not None]
    config = adapter_config_of(run.built.adapted, "base")
    write_adapter(
        run.pipeline,
        Path(case["out"]),
        AdapterOrigins(config=config, tokenizer_folder=Path(case["tokenizer"]), facts={}),
    )
    return result


def peft_model(case: dict[str, Any], dense: dict[str, torch.Tensor] | None = None) -> Any:
    """PEFT's model with the adapters that ours begins with. `dense` are weights to be used instead of the random
    ones.
    """
    model = plain.make_model(worker.config_of(case))
    with torch.no_grad():
        for name, weight in (dense or {}).items():
            model.get_parameter(name).copy_(weight)
    if case.get("bits") == 4 and dense is None:
        _quantize(model)
    return with_adapters(model, case)


def with_adapters(model: Any, case: dict[str, Any]) -> Any:
    """Adapters of PEFT's around any model, in the model's own dtype, with the values that ours begin with."""
    settings = settings_of(case)
    targets: Any = settings.targets[0] if settings.targets == ("all-linear",) else list(settings.targets)
    tie = bool(model.config.tie_word_embeddings and settings.modules_to_save)
    made: Any = get_peft_model(
        model,
        LoraConfig(
            r=settings.rank,
            lora_alpha=int(settings.alpha),
            target_modules=targets,
            task_type="CAUSAL_LM",
            modules_to_save=list(settings.modules_to_save) or None,
            use_rslora=settings.is_rank_stabilised,
            ensure_weight_tying=tie,
        ),
        autocast_adapter_dtype=False,
    )
    if settings.dropout:
        for name, module in list(made.named_modules()):
            if isinstance(getattr(module, "lora_dropout", None), torch.nn.ModuleDict):
                module.lora_dropout["default"] = HashedDropout(own_name(name), settings.dropout)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_A" in name:
                parameter.copy_(initial(own_name(name), tuple(parameter.shape), SEED))
    return made.train()


class HashedDropout(torch.nn.Module):
    """In place of PEFT's: what is dropped follows from document, position, layer and feature, by numpy alone."""

    def __init__(self, layer: str, share: float) -> None:
        super().__init__()
        self._seed = int.from_bytes(hashlib.sha256(layer.encode()).digest()[:4], "big")
        self._share, self.key = share, 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return hidden
        tokens, features = (np.arange(size, dtype=np.uint64) for size in hidden.shape[-2:])
        keys = _hashed(_hashed(np.array([self.key], np.uint64)) ^ tokens)
        values = _hashed(keys[:, None] ^ _hashed(_hashed(features) ^ np.uint64(self._seed)))
        kept = torch.from_numpy(values >= np.uint64(int(self._share * 2**32)))
        return hidden * kept / (1 - self._share)


def _hashed(values: np.ndarray) -> np.ndarray:
    low = np.uint64(0xFFFFFFFF)
    for factor, shift in ((0x9E3779B1, 15), (0x85EBCA77, 13), (0xC2B2AE3D, 16)):
        values = values * np.uint64(factor) & low
        values = values ^ (values >> np.uint64(shift))
    return values


def _document_key(numbers: np.ndarray, place: int) -> int:
    digest = hashlib.sha256(numbers.astype(np.uint32).tobytes()).digest()
    return int.from_bytes(hashlib.sha256(digest + place.to_bytes(8, "big")).digest()[:4], "big") >> 1


def own_name(name: str) -> str:
    """Ours of one of PEFT's parameters."""
    plain_name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
    return plain_name.replace(".default.weight", ".weight").replace(".base_layer", "")


def train_with_peft(model: Any, case: dict[str, Any]) -> tuple[list[Any], dict[str, torch.Tensor], dict[str, float]]:
    """([(loss, gradient norm)], trained weights by our names, validation)."""
    config, mask = model.config, case.get("loss_mask", 0.0)
    sampler = Sampler(worker.DOCUMENTS, case.get("global_batch", worker.GLOBAL_BATCH), worker.SEED)
    batches = [
        sampler.documents(number).astype(np.int64) for number in range(case.get("iterations", worker.ITERATIONS))
    ]
    reader = MemoryReader(worker.DOCUMENTS, config.vocab_size, worker.SEQ)
    drops = [module for module in model.modules() if isinstance(module, HashedDropout)]

    def on_document(numbers: np.ndarray, place: int) -> None:
        for drop in drops:
            drop.key = _document_key(numbers, place)

    records = plain.train(model, reader, batches, mask, on_document)
    weights = {
        own_name(name): parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    return records, weights, plain.validate(model, reader, case.get("val_documents", worker.VALIDATION_DOCUMENTS), mask)


def _quantize(model: Any) -> None:
    """bitsandbytes' own layers instead of the decoder's linear ones."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}":
            new = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                module.bias is not None,
                compute_dtype=torch.float32,
                quant_type="nf4",
                compress_statistics=True,
            )
            new.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new
            )
            new.bias = module.bias
            new.support_avx512bf16_for_cpu = False  # a form for larger layers, chosen when not training
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new.to("cpu"))
