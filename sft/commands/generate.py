"""`sft generate MODEL_DIR`: answers one prompt, a chat, or a file of questions."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.commands import asking

if TYPE_CHECKING:  # slow imports
    from sft.evaluate.answers import Asker
    from sft.evaluate.models import ModelPlace

EXIT_INTERRUPTED = 130


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL_DIR",
        help="a run's folder, a Hugging Face folder, a step-... or adapter folder, a .gguf file or a Hub id",
    )
    parser.add_argument("--prompt", default=None, metavar="TEXT", help="one question; - reads it from standard input")
    parser.add_argument(
        "--chat", action="store_true", help="chat in the terminal (default without --prompt and --data)"
    )
    parser.add_argument(
        "--system",
        default=None,
        metavar="TEXT",
        help="system message of --prompt and --chat (default: that of training)",
    )
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="FILE", help="questions: JSONL, as in training; answers may be missing"
    )
    parser.add_argument(
        "--out", type=Path, default=None, metavar="FILE", help="JSONL with the answers; resumed if it exists"
    )
    parser.add_argument(
        "--answer_field", default="answer", metavar="K", help="key of the answers in --out (default: answer)"
    )
    asking.add_row_flags(parser)
    asking.add_writing_flags(parser)
    asking.add_model_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    asking.silence_libraries()
    from rich.console import Console

    from sft.evaluate.models import find_model, read_training
    from tokenize_data.errors import UserError

    has_files = bool(arguments.data or arguments.config)
    if has_files and arguments.prompt is not None:
        raise UserError("--prompt and --data: give one of them")
    if has_files and arguments.out is None:
        raise UserError("--data needs --out FILE: where the answers go")
    if not has_files and arguments.prompt is None and not arguments.chat and not sys.stdin.isatty():
        raise UserError("nothing to ask: give --prompt TEXT (- for standard input), or --data FILE --out FILE")
    console = Console(highlight=False, soft_wrap=True, stderr=True)
    sampling = asking.sampling_of(arguments)
    place = find_model(arguments.model)
    training = place.training or (read_training(place.folder) if place.checkpoint is None else {})
    try:
        if has_files:
            return _answer_files(arguments, place, sampling, training, console)
        return _talk(arguments, place, sampling, training, console)
    except KeyboardInterrupt:
        console.print("interrupted" + ("; run the same command to resume" if has_files else ""))
        return EXIT_INTERRUPTED


def _answer_files(
    arguments: argparse.Namespace, place: ModelPlace, sampling: Any, training: dict[str, Any], console: Any
) -> int:
    from rich.progress import Progress

    from sft.evaluate import answers, decode
    from sft.evaluate.questions import specs_for
    from tokenize_data.errors import UserError
    from tokenize_data.examples import read_examples

    specs = specs_for(arguments.data, vars(arguments), training, arguments.config)
    groups = [read_examples(spec, answers_needed=False, limit=arguments.limit) for spec in specs]
    examples = _numbered([example for group in groups for example in group.rows])
    for group in groups:
        console.print(group.description)
    field = arguments.answer_field
    for example in examples:
        if field in example.row or answers.OWN_KEY in example.row:
            taken = field if field in example.row else answers.OWN_KEY
            raise UserError(
                f"{example.place}: the row has a key '{taken}' of its own: "
                + ("choose another --answer_field" if taken == field else "rename it")
            )
    with answers.open_store(arguments.out) as store:
        asker = _asker(arguments, place, sampling, console)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("answers", total=len(examples))
            records = answers.fill(
                store,
                asker,
                examples,
                lambda example, answer: {**example.row, field: answer.text},
                lambda done: progress.update(task, completed=done),
            )
    endings = [record[answers.OWN_KEY]["finish"] for record in records]
    console.print(f"{len(records):,} answers: {arguments.out}")
    if cut := sum(ending == decode.LENGTH for ending in endings):
        console.print(f"warning: {cut:,} answers are cut at --max_tokens {arguments.max_tokens}", style="yellow")
    if long := sum(ending not in (decode.LENGTH, decode.STOP) for ending in endings):
        console.print(f"warning: {long:,} prompts are longer than the model's context: no answer", style="yellow")
    return 0


def _numbered(examples: list[Any]) -> list[Any]:
    from dataclasses import replace

    return [replace(example, number=number) for number, example in enumerate(examples)]


def _asker(arguments: argparse.Namespace, place: ModelPlace, sampling: Any, console: Any, on_text: Any = None) -> Asker:
    from sft.evaluate import answers

    if arguments.server_url is None:
        loaded = asking.load(place, arguments, console)
        return answers.LocalAsker(loaded, sampling, asking.batch_size_of(arguments, loaded.model.device.type), on_text)
    asker: Asker = asking.server_asker(arguments, place, sampling)
    return asker


def _talk(
    arguments: argparse.Namespace, place: ModelPlace, sampling: Any, training: dict[str, Any], console: Any
) -> int:
    """Answer one prompt, or chat: earlier turns stay in the conversation."""
    from sft.evaluate.questions import system_message
    from tokenize_data.examples import Example

    shown = _Streamed()
    asker = _asker(
        arguments, place, sampling, console, shown.show if sys.stdout.isatty() or arguments.prompt is None else None
    )
    system = arguments.system if arguments.system is not None else system_message(training)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    is_chat = arguments.prompt is None
    if is_chat:
        console.print("an empty line or Ctrl-D ends the chat; /new begins another conversation", style="dim")
    start = list(messages)
    while True:
        question = _question(is_chat) if is_chat else sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
        if is_chat and not question.strip():
            return 0
        if is_chat and question.strip() == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": question})
        (answer,) = asker.answers([Example(number=0, place="--prompt", row={}, prompt=tuple(messages))])
        shown.end(answer.text)
        if answer.finish not in ("stop", "length"):
            console.print(f"no answer: {answer.finish}", style="yellow")
        if not is_chat:
            return 0
        messages.append({"role": "assistant", "content": answer.text})


def _question(is_chat: bool) -> str:
    try:
        return input("> ")
    except EOFError:
        return ""


class _Streamed:
    """Prints an answer as it grows, holding back incomplete characters."""

    def __init__(self) -> None:
        self._written = ""

    def show(self, number: int, text: str) -> None:
        text = text.lstrip().rstrip("\ufffd")
        if text.startswith(self._written):
            self._write(text[len(self._written) :])

    def end(self, text: str) -> None:
        rest = text[len(self._written) :] if text.startswith(self._written.rstrip()) else ""
        self._write(rest if self._written else text)
        sys.stdout.write("\n")
        sys.stdout.flush()
        self._written = ""

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        self._written += text
