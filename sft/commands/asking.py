"""Shared by `sft generate` and `sft evaluate`: the flags that select a model and its sampling, and loading it."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenize_data.dataset import FORMATS

if TYPE_CHECKING:  # slow imports
    from sft.evaluate.client import Client
    from sft.evaluate.decode import Sampling
    from sft.evaluate.models import LoadedModel, ModelPlace
    from tokenize_data.chat import ChatTemplate


def add_row_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rows", "read as in training unless given")
    group.add_argument("--format", default=None, help=f"{', '.join(FORMATS)} (default: from the first rows)")
    group.add_argument(
        "--question_key", default=None, metavar="K", help="key of the question (default: that of training, else prompt)"
    )
    group.add_argument(
        "--answer_key", default=None, metavar="K", help="key of the answer (default: that of training, else gold)"
    )
    group.add_argument(
        "--system_key", default=None, metavar="K", help="key of the system message (default: that of training)"
    )
    group.add_argument("--text_key", default=None, metavar="K", help="key of plain text rows (default: text)")
    group.add_argument(
        "--config",
        type=Path,
        default=None,
        metavar="YAML",
        help="a recipe: its val_datasets, or datasets if it has none, are added",
    )
    group.add_argument(
        "--limit", type=int, default=None, metavar="N", help="the first N rows of each data set (default: all)"
    )


def add_writing_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("writing")
    group.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default: 0)")
    group.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="sample from the likeliest tokens with this total probability (default: 1)",
    )
    group.add_argument("--top_k", type=int, default=0, help="sample from the K likeliest tokens (default: 0, all)")
    group.add_argument(
        "--max_tokens", type=int, default=256, metavar="N", help="maximum tokens of an answer (default: 256)"
    )
    group.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="texts that also end an answer")
    group.add_argument(
        "--seed",
        type=int,
        default=1234,
        help="seed for sampling; an answer does not depend on its batch (default: 1234)",
    )
    group.add_argument(
        "--batch_size",
        type=int,
        default=None,
        metavar="B",
        help="rows in a batch (default: 16; 64 on GPUs and servers)",
    )
    group.add_argument(
        "--template", default="auto", metavar="T", help="auto (the model's own), a packaged one, a Jinja file, or plain"
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where it runs")
    group.add_argument(
        "--device", default=None, help="cpu, cuda, cuda:1, or auto to spread over GPUs (default: a GPU if there is one)"
    )
    group.add_argument(
        "--dtype",
        default=None,
        choices=["fp32", "bf16", "fp16"],
        help="default: fp32 on the CPU, the files' own on GPUs",
    )
    group.add_argument(
        "--server_url", default=None, metavar="URL", help="ask an OpenAI-compatible server, such as vLLM's, instead"
    )
    group.add_argument(
        "--server_model", default=None, metavar="NAME", help="the model's name there (default: the only one)"
    )
    group.add_argument(
        "--server_api",
        default="completions",
        choices=["completions", "chat"],
        help="send ids made with the model's own template, or messages for the server's (default: completions)",
    )
    group.add_argument(
        "--key_env", default="OPENAI_API_KEY", metavar="VAR", help="environment variable with the server's key, if any"
    )


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    from sft.evaluate.decode import Sampling
    from tokenize_data.errors import UserError

    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise UserError(f"--batch_size {arguments.batch_size} must be at least 1")
    return Sampling(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        max_tokens=arguments.max_tokens,
        stop=tuple(arguments.stop),
        seed=arguments.seed,
    )


def batch_size_of(arguments: argparse.Namespace, device: str) -> int:
    return int(arguments.batch_size or (16 if device == "cpu" else 64))


def client_of(arguments: argparse.Namespace) -> Client:
    from sft.evaluate.client import Client

    return Client(url=arguments.server_url, key_variable=arguments.key_env)


def silence_libraries() -> None:
    """Silence libraries. Call it before transformers is imported."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # deprecation warnings between libraries
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def load(
    place: ModelPlace, arguments: argparse.Namespace, console: Any, borrowed: ChatTemplate | None = None
) -> LoadedModel:
    """Load a model into this process. A checkpoint is exported beside its run first, and removed afterwards."""
    from sft.evaluate import models

    options: dict[str, Any] = {
        "template": arguments.template,
        "borrowed": borrowed,
        "device": arguments.device,
        "dtype": arguments.dtype,
    }
    if place.checkpoint is None:
        return models.load_model(place, **options)
    assert place.run is not None
    scratch = place.run / f".asked-{os.getpid()}"
    try:
        return models.load_model(
            models.exported(place, scratch, lambda step, target: _export(step, target, console)), **options
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _export(step: Path, target: Path, console: Any) -> None:
    from sft.engine.start import prepare_environment

    prepare_environment()
    from sft.commands.export import find_checkpoint, write_model

    is_step = step.name.startswith("step-")
    run, iteration = (step.parent, int(step.name.removeprefix("step-"))) if is_step else (step, None)
    write_model(find_checkpoint(run, iteration, console), target, None, console)


def server_asker(arguments: argparse.Namespace, place: ModelPlace, sampling: Sampling) -> Any:
    """A model behind a server. With --server_api completions, tokenizer and template come from MODEL_DIR."""
    from sft.evaluate.answers import ServerAsker, model_of_server
    from tokenize_data.errors import UserError
    from tokenize_data.prompts import open_format

    client = client_of(arguments)
    chat = None
    if arguments.server_api == "completions":
        if place.checkpoint is not None:
            raise UserError(
                f"{place.folder} has no exported model, so no tokenizer for the server: sft export it first"
            )
        chat = open_format(place.tokenizer_folder, arguments.template)
    return ServerAsker(
        client=client,
        model=arguments.server_model or model_of_server(client),
        sampling=sampling,
        workers=arguments.batch_size or 64,
        chat=chat,
        stop_ids=chat.stop_ids if chat is not None else (),
    )


def template_of(place: ModelPlace, arguments: argparse.Namespace) -> ChatTemplate | None:
    """The chat template for a model without its own."""
    from tokenize_data.prompts import open_format

    return open_format(place.tokenizer_folder, arguments.template).template if place.checkpoint is None else None
