"""`sft train`, which is also `sft` with flags alone: fine-tune."""

from __future__ import annotations

import argparse


def add_flags(parser: argparse.ArgumentParser) -> None:
    from sft.config.flags import add_flags as add_config_flags

    parser.add_argument("--plan_only", action="store_true", help="the same as `sft plan`: show the plan, start nothing")
    add_config_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    from sft.resolve.settings import settings_of

    if arguments.plan_only:
        from sft.commands import plan

        return plan.show(settings_of(arguments, "plan", run_name="plan"))
    from sft.launcher import launch

    return launch.run(settings_of(arguments), arguments.argv)
