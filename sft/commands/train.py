"""`sft train`, which is also `sft` with flags alone: fine-tune."""

from __future__ import annotations

import argparse


def add_flags(parser: argparse.ArgumentParser) -> None:
    from sft.config.flags import add_flags as add_config_flags

    parser.add_argument("--plan_only", action="store_true", help="the same as `sft plan`: show the plan, start nothing")
    add_config_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    from sft.config.flags import typed_values
    from sft.config.train import TrainConfig
    from tokenize_data.errors import UserError

    values = typed_values(arguments)
    if arguments.plan_only:
        from sft.commands import plan

        return plan.show(TrainConfig(**{"run_name": "plan", **values}))
    if "run_name" not in values:
        raise UserError("--run_name is missing: it names the data set and the run, such as --run_name pubmedqa")
    from sft.job import launch

    return launch.run(TrainConfig(**values), arguments.argv)
