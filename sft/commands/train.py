"""`sft train`, which is also `sft` with flags alone: fine-tune."""

from __future__ import annotations

import argparse


def add_flags(parser: argparse.ArgumentParser) -> None:
    from sft.config.flags import add_flags as add_config_flags

    add_config_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    from sft.job import launch
    from sft.job.settings import config_of

    return launch.run(config_of(arguments), arguments.argv)
