"""`sft`: the first word names a command, which is imported only when it is used. Flags alone mean `train`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from sft.spec.versions import foreign_package_warning, main_versions
from sft.spec.workers import set_library_defaults
from tokenize_data.errors import OneLineParser, exit_code_of

COMMANDS = {
    "train": "fine-tune a model; `sft --checkpoint C --run_name R ...` is the same",
    "plan": "what a run would do: iterations, layout, memory and time; starts nothing",
    "sweep": "a grid of recipes, one run after another or several at once, with a table of the results",
    "convert-recipe": "another trainer's recipe as one of ours, with a comment for each key",
    "export": "a Hugging Face folder from a checkpoint of a run",
    "generate": "answers of a model: to one prompt, in a chat, or to a file of questions",
    "evaluate": "scores of a model on data with answers, compared with others, rated by a judge",
    "runs": "a table of all runs below a folder",
    "report": "one HTML page of a run, or of several; live with --watch",
    "merge": "adapters into their base: a Hugging Face folder",
    "parity": "train a small model of a base's shape on a layout and with plain transformers, and compare",
    "doctor": "what is installed and works on this machine, with a tiny training step",
    "login": "store tokens for the Hub and for trackers",
    "inspect": "documents with trained and masked tokens in colours, lengths, the manifest",
}
_OF_A_RUN = ("train", "plan")  # commands with the settings as flags; a recipe may come first


def make_parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:<14} {text}" for name, text in COMMANDS.items())
    parser = OneLineParser(
        prog="sft",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="sft [COMMAND] [flags]\n       sft RECIPE.yaml [flags]",
        description="A distributed fine-tuner for language models.",
        epilog=f"commands:\n{listing}\n\n`sft COMMAND -h` lists its flags.\n\nexample:\n"
        "  sft --checkpoint meditron --size 70 --run_name pubmedqa --data train.jsonl --val val.jsonl",
    )
    parser.add_argument("--version", action="store_true", help="versions of megasft, torch, transformers, deepspeed")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", nargs="?", help="see below (default: train)")
    return parser


def entry(argv: list[str] | None = None) -> int:
    set_library_defaults(os.environ)
    argv = sys.argv[1:] if argv is None else argv
    if (warning := foreign_package_warning()) is not None:
        print(f"sft: warning: {warning}", file=sys.stderr)
    if not argv or argv[0] in ("-h", "--help"):
        make_parser().print_help()
        return 0 if argv else 2
    if argv[0] == "--version":
        print("\n".join(f"{name} {version}" for name, version in main_versions().items()))
        return 0
    is_named = not argv[0].startswith("-") and not _is_recipe(argv[0])
    name = make_parser().parse_args(argv[:1]).command if is_named else "train"
    flags = argv[1:] if is_named else argv
    return exit_code_of(f"sft {name}", lambda: _run(name, flags))


def _is_recipe(word: str) -> bool:
    return not word.startswith("-") and word.endswith((".yaml", ".yml"))


def _run(name: str, flags: list[str]) -> int:
    command = importlib.import_module(f"sft.commands.{name.replace('-', '_')}")
    text = COMMANDS[name]
    parser = OneLineParser(prog=f"sft {name}", description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    command.add_flags(parser)
    if name in _OF_A_RUN:
        flags = ["--config", *flags] if flags and _is_recipe(flags[0]) else flags
        arguments, others = parser.parse_known(flags)
        arguments.others = others  # another trainer's flags, beside a recipe of that trainer
    else:
        arguments = parser.parse(flags)
    arguments.argv = flags
    code: int = command.run(arguments)
    return code
