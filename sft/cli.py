"""`sft`: the first word of argv names a command, which is imported only when it is used."""

from __future__ import annotations

import argparse
import importlib
import sys

from tokenize_data.errors import exit_code_of

COMMANDS = {
    "inspect": "documents with trained and masked tokens in colours, lengths, the manifest",
}


def make_parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="sft", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="A distributed fine-tuner for language models.", epilog=f"commands:\n{listing}\n\n`sft COMMAND -h` explains one.",
    )  # fmt: skip
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    return parser


def entry(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    name = make_parser().parse_args(argv[:1]).command
    command = importlib.import_module(f"sft.commands.{name}")
    parser = argparse.ArgumentParser(prog=f"sft {name}", description=COMMANDS[name].capitalize() + ".")
    command.add_flags(parser)
    arguments = parser.parse_args(argv[1:])
    return exit_code_of(f"sft {name}", lambda: command.run(arguments))
