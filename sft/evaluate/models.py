"""What MODEL_DIR means: a Hugging Face folder, a run, a checkpoint, an adapter on its base, a GGUF file or a Hub id;
and loading it.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sft.families.sizes import check_sizes
from sft.model.base_folder import gguf_file_in, resolve
from tokenize_data.chat import ChatTemplate
from tokenize_data.errors import UserError, shorten
from tokenize_data.prompts import ChatFormat, open_format
from tokenize_data.tokenizer_files import read_json

ADAPTER = "adapter_config.json"
DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class ModelPlace:
    """The location of a model. `folder` has weights and configuration; for an adapter, its base's."""

    label: str
    folder: Path
    tokenizer_folder: Path
    adapter: Path | None = None
    checkpoint: Path | None = None  # a checkpoint that must be exported first
    run: Path | None = None  # the run that made it
    training: dict[str, Any] = field(default_factory=dict)  # training.json
    fingerprint: tuple[Any, ...] = ()  # changes when the files change


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A loaded model with its chat format."""

    place: ModelPlace
    model: Any
    format: ChatFormat
    stop_ids: tuple[int, ...]


def find_model(given: str) -> ModelPlace:
    """Find the model that a path or name refers to."""
    path = Path(given).expanduser()
    if not path.exists() or gguf_file_in(path) is not None:
        folder = resolve(given)
        name = given.rstrip("/") if "/" in given and not path.exists() else path.stem
        return ModelPlace(label=name, folder=folder, tokenizer_folder=folder, fingerprint=_identity(folder))
    if (path / ADAPTER).exists():
        return _adapter(path, _run_of(path))
    if (path / "config.json").exists():
        run = _run_of(path)
        return _hugging_face(path, run, run.name if run is not None else path.resolve().name)
    if (path / "hf" / "config.json").exists():
        return _hugging_face(path / "hf", path, path.resolve().name)
    if (path / "adapter" / ADAPTER).exists():
        return _adapter(path / "adapter", path)
    if path.name.startswith("step-") and (path / "manifest.json").exists():
        return _checkpoint(path, path.parent)
    if any(path.glob("step-*/manifest.json")):
        return _checkpoint(None, path)
    if (path / "run.toml").exists():
        raise UserError(
            f"{given} is a run without a model or a checkpoint yet: wait for its first checkpoint (--save_interval)"
        )
    raise UserError(
        f"{given} is not a model: give a Hugging Face folder (config.json and *.safetensors), a run's folder, a "
        "step-... "
        "or adapter folder, "
        "a .gguf file, or a Hub id"
    )


def base_of(place: ModelPlace) -> str:
    """The base that this model was trained from, for `--compare base`."""
    if place.adapter is not None:
        return str(place.folder)
    folder = place.training.get("resolved", {}).get("base_folder")
    if not isinstance(folder, str):
        raise UserError(
            f"--compare base: {place.folder} has no training.json that names its base model: give the base's folder"
        )
    if not Path(folder).is_dir():
        raise UserError(f"--compare base: the base model was in {folder}, which no longer exists: give its folder")
    return folder


def load_model(
    place: ModelPlace,
    *,
    template: str = "auto",
    borrowed: ChatTemplate | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> LoadedModel:
    """Load weights and chat format: in float32 on the CPU, in the files' dtype on a GPU, unless `dtype` is given."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    check_sizes(read_json(place.folder / "config.json"), place.folder / "config.json")
    chat = open_format(place.tokenizer_folder, template, borrowed)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = {
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        None: torch.float32 if device == "cpu" else "auto",
    }[dtype]
    spread = {"device_map": "auto"} if device == "auto" else {}
    if spread and importlib.util.find_spec("accelerate") is None:
        raise UserError(
            "--device auto spreads a model over GPUs with accelerate: pip install accelerate, or give cuda:0 or cpu"
        )
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(place.folder, dtype=kind, **spread)
        if place.adapter is not None:
            model = with_adapter(model, place.adapter, chat.tokenizer.vocabulary_size).get_base_model()
        model = model if spread else model.to(device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{place.folder} does not fit into the memory of {device}: use --dtype bf16, or --device auto"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"{place.folder} cannot be loaded by transformers ({type(error).__name__}: {shorten(error, 200)})"
        ) from error
    return LoadedModel(place=place, model=model.eval(), format=chat, stop_ids=_stop_ids(model, chat))


def with_adapter(model: Any, folder: Path, vocabulary_size: int) -> Any:
    """Load a PeftModel; its base is extended if the tokenizer has more tokens."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{folder} is an adapter, which needs peft: pip install peft, or merge it first (sft merge)")
    from peft import PeftModel

    if vocabulary_size > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(vocabulary_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT uses an old name of transformers (PEFT 0.21)
        return PeftModel.from_pretrained(model, str(folder))


def _stop_ids(model: Any, chat: ChatFormat) -> tuple[int, ...]:
    """Stop tokens: the template's end of turn, EOS, and those in the model's generation config."""
    own = getattr(model.generation_config, "eos_token_id", None)
    more = own if isinstance(own, list) else [own] if isinstance(own, int) else []
    return tuple(dict.fromkeys([*chat.stop_ids, *more]))


def _hugging_face(folder: Path, run: Path | None, label: str) -> ModelPlace:
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has a config.json and no *.safetensors: give a folder with weights")
    training = read_training(folder)
    return ModelPlace(
        label=label, folder=folder, tokenizer_folder=folder, run=run, training=training, fingerprint=_identity(folder)
    )


def _adapter(folder: Path, run: Path | None) -> ModelPlace:
    try:
        base = json.loads((folder / ADAPTER).read_text())["base_model_name_or_path"]
        assert isinstance(base, str)
    except (ValueError, KeyError, TypeError, AssertionError, OSError) as error:
        raise UserError(
            f"{folder / ADAPTER} names no base_model_name_or_path: write the base's folder or Hub id there"
        ) from error
    try:
        base_folder = resolve(base)
    except UserError as error:
        raise UserError(f"{folder} is an adapter of {base}, which cannot be found ({error})") from error
    own = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))
    return ModelPlace(
        label=run.resolve().name if run is not None else folder.resolve().name,
        folder=base_folder,
        tokenizer_folder=folder if own else base_folder,
        adapter=folder,
        run=run,
        training=read_training(folder),
        fingerprint=(*_identity(folder), *_identity(base_folder)),
    )


def _checkpoint(step: Path | None, run: Path) -> ModelPlace:
    return ModelPlace(
        label=run.resolve().name,
        folder=run,
        tokenizer_folder=run,
        checkpoint=step or run,
        run=run,
        fingerprint=tuple(sorted(str(path) for path in run.glob("step-*"))),
    )


def exported(place: ModelPlace, folder: Path, export: Callable[[Path, Path], None]) -> ModelPlace:
    """Export a checkpoint to `folder` by `export(checkpoint or run, folder)`, and return its model's location."""
    assert place.checkpoint is not None
    export(place.checkpoint, folder)
    if (folder / ADAPTER).exists():
        return replace(_adapter(folder, place.run), label=place.label)
    return _hugging_face(folder, place.run, place.label)


def _run_of(folder: Path) -> Path | None:
    parent = folder.resolve().parent
    return parent if (parent / "run.toml").exists() else None


def read_training(folder: Path) -> dict[str, Any]:
    """The content of training.json; empty without one."""
    try:
        content = json.loads((folder / "training.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _identity(folder: Path) -> tuple[Any, ...]:
    """Hash names, sizes and times of the files that determine the answers."""
    files = sorted(file for pattern in ("*.safetensors", "*.json", "*.jinja") for file in folder.glob(pattern))
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
