"""`sft train`, which is also `sft` with flags alone: fine-tune."""

from __future__ import annotations

import argparse


def add_flags(parser: argparse.ArgumentParser) -> None:
    from sft.config.flags import add_flags as add_config_flags

    add_config_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    from sft.config.flags import typed_values
    from sft.config.train import TrainConfig
    from sft.job import launch
    from tokenize_data.errors import UserError

    values = typed_values(arguments)
    if "run_name" not in values:
        raise UserError("--run_name is missing: it names the data set and the run, such as --run_name pubmedqa")
    return launch.run(TrainConfig(**values), arguments.argv)
