"""`sft convert-recipe OLD.yaml`: converts another trainer's recipe to ours."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", type=Path, metavar="OLD.yaml", help="a recipe of TRL, the alignment-handbook, or a flat config.yml"
    )


def run(arguments: argparse.Namespace) -> int:
    from sft.config.convert import convert
    from tokenize_data.errors import EXIT_OK, UserError

    text, reason = convert(arguments.recipe)
    sys.stdout.write(text)
    sys.stdout.flush()
    if reason is not None:
        raise UserError(f"{arguments.recipe}: {reason}")
    return EXIT_OK
