"""Merges adapters into their base: finds the base, compares logits on prompts, and records the result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sft.checkpoint import hf_folder
from sft.checkpoint.adapter import AdapterFiles
from sft.checkpoint.merged_tensors import Merge, Weighted, largest_difference, plan_merge, write_merged
from sft.config.quantisation import quantisation_of
from sft.spec.base import BaseModel
from tokenize_data.errors import UserError
from tokenize_data.reader import ShardReader

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest allowed difference of a logit, relative to the largest logit: the effect of rounding all weights to these
# types.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_NUM_PROMPTS, _PROMPT_TOKENS = 8, 128
_PROMPTS = (
    "Does aspirin lower the risk of a second heart attack?",
    "The capital of France is Paris, and its largest river is the",
    "Summarise: the committee met on Tuesday and put off its decision until the accounts are complete.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Dear Sir or Madam, I am writing with regard to the invoice of 3 March",
    "Translate into German: the weather is getting worse.",
    "If 3 apples cost 2 francs, how much do 12 apples cost?",
    "In the beginning of the nineteenth century, most people in Europe lived",
)


def merge_into(
    target: Path,
    base: BaseModel,
    folders: Sequence[Path],
    *,
    weights: Sequence[float] = (),
    dtype: str | None = None,
    prompts: Path | None = None,
    tolerance: float | None = None,
    any_base: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
    done: Callable[[int, int], None] = lambda n, of: None,
) -> None:
    """Write base + adapters to `target`, if the merged model computes what base and adapters compute."""
    from transformers import AutoConfig

    adapters = [Weighted(files=AdapterFiles(folder), weight=weight) for folder, weight in _paired(folders, weights)]
    trainings = [_training_of(folder) for folder in folders]
    for folder, training in zip(folders, trainings, strict=True):
        _check_base(folder, training, base, any_base)
        if bits := _bits_of(training):
            say(
                f"{folder} was trained on its base in {bits} bits: it is merged into the 16- or 32-bit weights, "
                "which it has not seen"
            )
    config = AutoConfig.from_pretrained(base.folder, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{base.folder} is quantised, and an adapter cannot be merged into that: name the model before "
            "quantisation with --base"
        )
    chosen = DTYPES[dtype] if dtype else config.dtype if config.dtype in TOLERANCES else torch.float32
    merge = plan_merge(base.folder, config, adapters, chosen, trust_remote_code)
    scratch = target.with_name(f".{target.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        write_merged(merge, scratch, done)
        tokenizer = _tokenizer_folder([*reversed(folders), base.folder])
        documents = _documents(prompts, trainings[-1], tokenizer, trust_remote_code)
        measured = _measure(merge, scratch, documents, tolerance if tolerance is not None else TOLERANCES[chosen])
        say(
            f"logits of {measured['tokens']:,} tokens differ by at most {measured['largest_logit_difference']:.2e}, "
            f"the largest is {measured['largest_logit']:.1f}"
        )
        _write_surroundings(merge, scratch, base, tokenizer)
        hf_folder.write_training(scratch, _facts(adapters, trainings, base, chosen, measured))
        hf_folder.publish(scratch, target, overwrite=overwrite)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _measure(merge: Merge, scratch: Path, documents: Sequence[Sequence[int]], tolerance: float) -> dict[str, Any]:
    difference, largest = largest_difference(merge, scratch, documents)
    if not difference <= tolerance * largest:
        raise UserError(
            f"the merged model's logits differ from those of base and adapters by up to {difference:.2e}, more than "
            f"{tolerance:g} of the "
            f"largest ({largest:.2e}): {_name_of(merge.dtype)} is too coarse for what the adapter adds; "
            "use --dtype fp32, or a larger --tolerance"
        )
    return {
        "largest_logit_difference": difference,
        "largest_logit": largest,
        "tolerance": tolerance,
        "prompts": len(documents),
        "tokens": sum(len(document) for document in documents),
    }


def _documents(
    prompts: Path | None, training: Mapping[str, Any], tokenizer_folder: Path, trust_remote_code: bool
) -> list[list[int]]:
    """Token ids for the comparison: the user's prompts, else documents from training, else a mix of tokens."""
    if prompts is None:
        shards = Path(training.get("resolved", {}).get("data_folder", "/nonexistent"))
        if (shards / "manifest.json").is_file():
            reader = ShardReader(shards)
            return [reader[number].ids[:_PROMPT_TOKENS].tolist() for number in range(min(_NUM_PROMPTS, len(reader)))]
    from transformers import AutoTokenizer

    texts = list(_PROMPTS)
    if prompts is not None:
        try:
            texts = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()][:_NUM_PROMPTS]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{prompts} cannot be read as text ({error}): give a file with a prompt a line") from error
        if not texts:
            raise UserError(f"{prompts} has no prompts: give a file with a prompt a line")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=trust_remote_code)
    return [tokenizer(text)["input_ids"][:_PROMPT_TOKENS] for text in texts]


def _write_surroundings(merge: Merge, scratch: Path, base: BaseModel, tokenizer: Path) -> None:
    from transformers import GenerationConfig

    has_generation = (base.folder / "generation_config.json").exists()
    generation = GenerationConfig.from_pretrained(base.folder) if has_generation else None
    hf_folder.write_config(scratch, merge.config, generation, merge.dtype, merge.config.get_text_config().vocab_size)
    hf_folder.copy_tokenizer(tokenizer, scratch)
    hf_folder.stop_at_turns(scratch)


def _facts(
    adapters: Sequence[Weighted],
    trainings: Sequence[Mapping[str, Any]],
    base: BaseModel,
    dtype: torch.dtype,
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    merged = {
        "base": base.entry.path,
        "base_fingerprint": base.fingerprint,
        "dtype": _name_of(dtype),
        **measured,
        "adapters": [
            {"folder": one.files.folder.name, "weight": one.weight, "bits": _bits_of(training)}
            for one, training in zip(adapters, trainings, strict=True)
        ],
    }
    return {**(trainings[-1] if len(trainings) == 1 else {"trainings": list(trainings)}), "merged": merged}


def _paired(folders: Sequence[Path], weights: Sequence[float]) -> list[tuple[Path, float]]:
    weights = list(weights) or [1.0] * len(folders)
    if len(weights) != len(folders):
        raise UserError(f"{len(weights)} --weights for {len(folders)} adapters: give one for each, or none")
    return list(zip(folders, weights, strict=True))


def _training_of(folder: Path) -> dict[str, Any]:
    """Read training.json; adapters that PEFT saved do not have it."""
    try:
        content = json.loads((folder / "training.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _bits_of(training: Mapping[str, Any]) -> int | None:
    quantisation = quantisation_of(training.get("config") or {})
    return quantisation.bits if quantisation else None


def _check_base(folder: Path, training: Mapping[str, Any], base: BaseModel, any_base: bool) -> None:
    made_on = training.get("base_fingerprint")
    if made_on is not None and made_on != base.fingerprint and not any_base:
        raise UserError(
            f"{folder} was trained on {training.get('base')} (fingerprint {made_on[:12]}), {base.folder} is another "
            "model "
            f"({base.fingerprint[:12]}): give that base with --base, or --any_base to add it to this one nevertheless"
        )


def _tokenizer_folder(folders: Sequence[Path]) -> Path:
    return next((folder for folder in folders if (folder / "tokenizer_config.json").is_file()), folders[-1])


def _name_of(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value is dtype)
