"""`sft parity`: train a small model of a base's own shape on a layout, and with plain transformers, and compare."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", default="baseline", metavar="NAME", help="base model: an entry of checkpoints.toml or a folder")
    parser.add_argument("--size", default=None, metavar="S", help="size of the entry (default: 7)")
    parser.add_argument("--checkpoints_file", type=Path, default=None, metavar="F", help="default: ./checkpoints.toml or the packaged one")
    parser.add_argument("--tp", type=int, default=1, metavar="T", help="tensor-parallel size (default: 1)")
    parser.add_argument("--pp", type=int, default=1, metavar="P", help="pipeline stages (default: 1)")
    parser.add_argument("--dp", type=int, default=1, metavar="D", help="data-parallel replicas (default: 1)")
    parser.add_argument("--no_sequence_parallel", action="store_true", help="do not split activations")
    parser.add_argument("--recompute", default="none", choices=["none", "selective", "full"], help="as in training (default: none)")
    parser.add_argument("--loss_mask", type=float, default=0.0, metavar="W", help="weight of user and system tokens (default: 0)")
    parser.add_argument("--iters", type=int, default=8, metavar="N", help="iterations to compare (default: 8)")


def run(arguments: argparse.Namespace) -> int:
    import os

    from sft.job import ending, processes
    from sft.plan.experts import check_no_experts
    from sft.plan.layout import ModelShape, choose_layout

    for name in ("tp", "pp", "dp", "iters"):
        if getattr(arguments, name) < 1:
            from tokenize_data.errors import UserError

            raise UserError(f"--{name} {getattr(arguments, name)} must be at least 1")
    config = _model_config(arguments)
    check_no_experts(config.to_dict())
    world = arguments.tp * arguments.pp * arguments.dp
    layout = choose_layout(
        world, ModelShape.of_config(config.to_dict()), tp=arguments.tp, pp=arguments.pp,
        sequence_parallel=not arguments.no_sequence_parallel, global_batch=world * 12,
    )  # fmt: skip
    if world > 1 and "RANK" not in os.environ:
        return processes.start("parity", arguments.argv, processes.Place(per_node=world), threads=1)
    if world == 1:
        processes.be_alone()
    return ending.guarded("parity", lambda: _compare(arguments, config, layout))


def _compare(arguments: argparse.Namespace, config: Any, layout: Any) -> int:
    from sft.engine.start import prepare_environment

    prepare_environment()
    from sft.job import parity

    outcome = parity.compare(config, layout, iterations=arguments.iters, loss_mask=arguments.loss_mask, recompute=arguments.recompute)
    if outcome is None:
        return 0
    sys.stdout.write(
        "\n".join(parity.table(outcome, layout, config.architectures[0] if config.architectures else config.model_type)) + "\n"
    )
    return 0 if outcome.is_equal else 3


def _model_config(arguments: argparse.Namespace) -> Any:
    """The configuration alone: no weights are fetched."""
    from transformers import AutoConfig

    from sft.model.base_folder import gguf_file_in, resolve
    from tokenize_data.bases import find_base
    from tokenize_data.errors import UserError

    is_gguf = gguf_file_in(arguments.checkpoint) is not None
    path = arguments.checkpoint if is_gguf else find_base(arguments.checkpoint, arguments.size, arguments.checkpoints_file).path
    path = str(resolve(path)) if gguf_file_in(path) is not None else path
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"the configuration of '{path}' cannot be read ({' '.join(str(error).split())[:160]}): check the name") from error
