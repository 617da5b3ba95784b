"""`sft merge ADAPTER_DIR --out DIR`: merges adapters into their base, tensor by tensor, and compares logits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapter_dir",
        type=Path,
        nargs="+",
        metavar="ADAPTER_DIR",
        help="adapters in PEFT's format, or runs that have trained one; one or several",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to")
    parser.add_argument(
        "--weights", type=float, nargs="+", default=[], metavar="W", help="how much of each is added (default: 1)"
    )
    parser.add_argument(
        "--base", default=None, metavar="NAME", help="base model: a folder, or an entry (default: the adapter's own)"
    )
    parser.add_argument("--size", default=None, metavar="S", help="size of the entry (default: 7)")
    parser.add_argument(
        "--checkpoints_file", default=None, metavar="F", help="default: ./checkpoints.toml or the packaged one"
    )
    parser.add_argument("--any_base", action="store_true", help="add it to another base than it was trained on")
    parser.add_argument(
        "--dtype", default=None, choices=["fp32", "bf16", "fp16"], help="dtype of the weights (default: the base's)"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        default=None,
        metavar="FILE",
        help="compare on these, one a line (default: trained ones)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=None,
        metavar="T",
        help="largest difference of logits, relative to the largest",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base model")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from sft.engine.start import prepare_environment
    from tokenize_data.errors import UserError

    if arguments.out.exists():
        raise UserError(f"{arguments.out} exists: give another --out, or remove it first")
    arguments.adapter_dir = [_of_run(folder) for folder in arguments.adapter_dir]
    prepare_environment()
    from sft.checkpoint.merge_adapters import merge_into

    console = Console(highlight=False, soft_wrap=True)
    base = _base(arguments)
    with Progress(console=console) as progress:
        task = progress.add_task("merging", total=None)
        merge_into(
            arguments.out,
            base,
            arguments.adapter_dir,
            weights=arguments.weights,
            dtype=arguments.dtype,
            prompts=arguments.prompts,
            tolerance=arguments.tolerance,
            any_base=arguments.any_base,
            trust_remote_code=arguments.trust_remote_code,
            say=console.print,
            done=lambda number, total: progress.update(task, completed=number, total=total),
        )
    console.print(f"model: {arguments.out}")
    return 0


def _of_run(folder: Path) -> Path:
    """The adapter's folder, also for a run's folder."""
    inner = folder / "adapter"
    return inner if inner.is_dir() and not (folder / "adapter_config.json").exists() else folder


def _base(arguments: argparse.Namespace) -> Any:
    from sft.checkpoint.adapter_config import read_adapter_config
    from sft.config.settings import Settings
    from sft.resolve.base import find_base_model
    from tokenize_data.errors import UserError

    configs = [read_adapter_config(folder) for folder in arguments.adapter_dir]
    name = arguments.base or configs[0].base
    if name is None:
        raise UserError(f"{arguments.adapter_dir[0]} does not say what its base is: give it with --base")
    return find_base_model(
        Settings.of(
            run_name="merge", checkpoint=str(name), size=arguments.size, checkpoints_file=arguments.checkpoints_file
        )
    )
