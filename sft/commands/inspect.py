"""`sft inspect`: shows a data set as the model sees it, and what to fix before training."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenize_data.checks.check import Report
    from tokenize_data.reader import ShardReader

_MOST_TEXTS = 50_000


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--run_name", required=True, metavar="R", help="name of the data set; R-val is its validation part")
    add("--tokenized_data_dir", default="tokenized", metavar="D", help="root of the shards (default: tokenized)")
    add("--row", type=int, default=None, metavar="N", help="show document N, counted from 0 (default: the first few)")
    add("--documents", type=int, default=3, metavar="N", help="how many documents to show (default: 3)")
    add("--json", action="store_true", help="one object per document: row, ids, roles, trained")
    add("--chart", type=Path, default=None, metavar="PNG", help="write the length histogram as a picture")
    add("--page", type=Path, default=None, metavar="HTML", help="write everything to one page, such as data.html")
    add(
        "--against",
        nargs="+",
        default=(),
        metavar="FILE",
        help="files of a test set: are its questions among the trained ones?",
    )
    for key in ("question_key", "answer_key"):
        add(f"--{key}", default=None, metavar="K", help=f"{key.split('_')[0]} key of --against, where it differs")
    add(
        "--checks",
        type=int,
        default=_MOST_TEXTS,
        metavar="N",
        help=f"read at most N documents for the checks, spread evenly (default: {_MOST_TEXTS}); 0: no checks",
    )
    add("--verify", action="store_true", help="read every file and check its SHA-256")


def run(arguments: argparse.Namespace) -> int:
    from tokenize_data.errors import UserError
    from tokenize_data.manifest import dataset_folder
    from tokenize_data.reader import ShardReader

    reader = ShardReader(
        dataset_folder(Path(arguments.tokenized_data_dir), arguments.run_name), verify=arguments.verify
    )
    if arguments.row is not None and not 0 <= arguments.row < len(reader):
        raise UserError(f"--row {arguments.row}: {reader.folder} has documents 0 to {len(reader) - 1}")
    if arguments.checks < 0:
        raise UserError(f"--checks {arguments.checks} must be at least 0")
    if not arguments.checks and (arguments.against or arguments.page):
        raise UserError("--against and --page need the checks: leave out --checks 0")
    if arguments.json and (arguments.against or arguments.page):
        raise UserError("--json prints documents alone: give --against and --page without it")
    if arguments.json:
        return _print_json(reader, arguments.row)
    return _show(reader, arguments)


def _print_json(reader: ShardReader, row: int | None) -> int:
    from tokenize_data.rendered import ROLE_NAMES

    for number in range(len(reader)) if row is None else [row]:
        document = reader[number]
        file, line = reader.place(number)
        content = {
            "row": number,
            "ids": document.ids.tolist(),
            "roles": [ROLE_NAMES[role] for role in document.roles()],
            "trained": document.trained().tolist(),
            "cut": int(reader.cut[number]),
            "file": file,
            "line": line,
        }
        sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()
    return 0


def _show(reader: ShardReader, arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from sft.observe import data_page, documents, findings, lengths
    from tokenize_data.checks.texts import backend_of

    console = Console(highlight=False, soft_wrap=True)
    backend = backend_of(reader)
    rows = range(min(arguments.documents, len(reader))) if arguments.row is None else [arguments.row]
    console.print(documents.legend())
    for number in rows:
        console.print(documents.heading(reader, number))
        console.print(documents.coloured(reader[number], backend))
    if arguments.row is None:
        console.print(documents.manifest_table(reader.manifest, reader.folder))
        console.print(lengths.bars(reader.lengths, reader.manifest.seq))
    if arguments.chart is not None:
        lengths.write_chart(reader.lengths, reader.trained, reader.manifest.seq, arguments.chart)
        console.print(f"length histogram written to {arguments.chart}")
    is_asked = arguments.row is None or arguments.against or arguments.page is not None
    report = _check(reader, arguments) if arguments.checks and is_asked else None
    if report is not None:
        findings.show(console, report)
    for warning in findings.of_manifest(reader, report):
        console.print(f"warning: {warning}", style="yellow")
    if arguments.page is not None and report is not None:
        data_page.write(reader, backend, report, arguments.page)
        console.print(f"page written to {arguments.page}")
    return 0


def _check(reader: ShardReader, arguments: argparse.Namespace) -> Report:
    from sft.observe.findings import CheckProgress
    from tokenize_data import manifest
    from tokenize_data.checks.check import check
    from tokenize_data.reader import ShardReader

    folder = reader.folder.parent / f"{arguments.run_name}-val"
    validation = ShardReader(folder) if manifest.read(folder) is not None else None
    keys: dict[str, Any] = {
        name: value for name in ("question_key", "answer_key") if (value := getattr(arguments, name)) is not None
    }
    with CheckProgress() as progress:
        return check(
            reader,
            validation=validation,
            against=arguments.against,
            keys=keys,
            most_texts=arguments.checks,
            progress=progress,
        )
