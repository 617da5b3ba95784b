"""`sft parity`: trains a small model of a base's shape, or the base itself, on a layout and with plain transformers,
and compares.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", default="baseline", metavar="NAME", help="base model: an entry of checkpoints.toml or a folder"
    )
    parser.add_argument("--size", default=None, metavar="S", help="size of the entry (default: 7)")
    parser.add_argument(
        "--checkpoints_file",
        type=Path,
        default=None,
        metavar="F",
        help="default: ./checkpoints.toml or the packaged one",
    )
    parser.add_argument("--tp", type=int, default=1, metavar="T", help="tensor-parallel size (default: 1)")
    parser.add_argument("--pp", type=int, default=1, metavar="P", help="pipeline stages (default: 1)")
    parser.add_argument("--dp", type=int, default=1, metavar="D", help="data-parallel replicas (default: 1)")
    parser.add_argument("--no_sequence_parallel", action="store_true", help="do not split activations")
    parser.add_argument(
        "--recompute", default="none", choices=["none", "selective", "full"], help="as in training (default: none)"
    )
    parser.add_argument(
        "--loss_mask", type=float, default=0.0, metavar="W", help="weight of user and system tokens (default: 0)"
    )
    parser.add_argument("--iters", type=int, default=8, metavar="N", help="iterations to compare (default: 8)")
    parser.add_argument(
        "--dtype", default=None, choices=["fp32", "bf16"], help="default: fp32; with --weights as in training"
    )
    parser.add_argument(
        "--weights",
        action="store_true",
        help="compare the base's own weights on rows of --run_name, on the devices here",
    )
    parser.add_argument(
        "--rows", type=int, default=64, metavar="N", help="with --weights: number of documents (default: 64)"
    )
    parser.add_argument("--run_name", default=None, metavar="R", help="with --weights: the data, tokenised before")
    parser.add_argument(
        "--tokenized_data_dir", default="tokenized", metavar="D", help="with --weights: root of the shards"
    )
    parser.add_argument(
        "--seq", type=int, default=2048, metavar="L", help="with --weights: as in training (default: 2048)"
    )
    parser.add_argument(
        "--micro_batch", type=int, default=1, metavar="B", help="with --weights: as in training (default: 1)"
    )


def run(arguments: argparse.Namespace) -> int:
    from tokenize_data.errors import UserError

    for name in ("tp", "pp", "dp", "iters", "rows"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)} must be at least 1")
    if arguments.weights and arguments.run_name is None:
        raise UserError("--weights compares on rows of a data set: name it with --run_name, or leave --weights out")
    world = arguments.tp * arguments.pp * arguments.dp
    return _run_weights(arguments, world) if arguments.weights else _run_small(arguments, world)


def _run_small(arguments: argparse.Namespace, world: int) -> int:
    from sft.families.experts import check_no_experts
    from sft.plan.layout import ModelShape, choose_layout

    config = _model_config(arguments)
    check_no_experts(config.to_dict())
    layout = choose_layout(
        world,
        ModelShape.of_config(config.to_dict()),
        tp=arguments.tp,
        pp=arguments.pp,
        sequence_parallel=not arguments.no_sequence_parallel,
        global_batch=world * 12,
    )

    def compare() -> int:
        import torch

        from sft.launcher.rendezvous import connect
        from sft.verify import parity

        outcome = parity.compare(
            config,
            layout,
            connect(300),
            iterations=arguments.iters,
            loss_mask=arguments.loss_mask,
            recompute=arguments.recompute,
            dtype=torch.bfloat16 if arguments.dtype == "bf16" else torch.float32,
        )
        if outcome is None:
            return 0
        _say(parity.table(outcome, layout, config.architectures[0] if config.architectures else config.model_type))
        return 0 if outcome.is_equal else 3

    return _start(arguments, world, compare)


def _run_weights(arguments: argparse.Namespace, world: int) -> int:
    from sft.config.settings import Settings
    from sft.resolve.run import resolve

    names = (
        "checkpoint",
        "size",
        "run_name",
        "tokenized_data_dir",
        "tp",
        "pp",
        "recompute",
        "loss_mask",
        "dtype",
        "seq",
        "micro_batch",
    )
    given = {name: getattr(arguments, name) for name in names}
    file = str(arguments.checkpoints_file) if arguments.checkpoints_file else None
    settings = Settings.of(
        **given,
        checkpoints_file=file,
        nproc_per_node=world,
        sequence_parallel=not arguments.no_sequence_parallel,
        global_batch=max(64, world),
    )
    spec = resolve(settings, world=world)

    def compare() -> int:
        from sft.launcher.rendezvous import connect
        from sft.verify import parity_rows

        outcome = parity_rows.compare(spec, arguments.rows, connect(1800))
        if outcome is None:
            return 0
        _say(parity_rows.table(outcome, spec))
        return 0 if outcome.is_equal else 3

    return _start(arguments, world, compare)


def _start(arguments: argparse.Namespace, world: int, compare: Callable[[], int]) -> int:
    """Start the processes as a launcher; compare as one of them, or as the only one."""
    import os

    from sft.launcher import processes
    from sft.worker import ending

    if world > 1 and "RANK" not in os.environ:
        return processes.start(
            "parity", ["-m", "sft", "parity", *arguments.argv], processes.NodeSlot(per_node=world), threads=1
        )
    if world == 1:
        processes.set_single_process_env()

    def prepared() -> int:
        from sft.engine.start import prepare_environment

        prepare_environment()
        return compare()

    return ending.guarded("parity", prepared)


def _say(lines: Sequence[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")


def _model_config(arguments: argparse.Namespace) -> Any:
    """Load the configuration only, without fetching weights."""
    from transformers import AutoConfig

    from sft.families.sizes import check_sizes
    from sft.model.base_folder import gguf_file_in, resolve
    from tokenize_data.bases import find_base
    from tokenize_data.errors import UserError
    from tokenize_data.tokenizer_files import read_json

    is_gguf = gguf_file_in(arguments.checkpoint) is not None
    path = (
        arguments.checkpoint
        if is_gguf
        else find_base(arguments.checkpoint, arguments.size, arguments.checkpoints_file).path
    )
    path = str(resolve(path)) if gguf_file_in(path) is not None else path
    check_sizes(read_json(Path(path).expanduser() / "config.json"), f"{path}/config.json")
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the configuration of '{path}' cannot be read ({' '.join(str(error).split())[:160]}): check the name"
        ) from error
