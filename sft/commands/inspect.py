"""`sft inspect`: a data set as the model sees it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run_name", required=True, metavar="R", help="name of the data set; R-val is its validation part"
    )
    parser.add_argument(
        "--tokenized_data_dir", default="tokenized", metavar="D", help="root of the shards (default: tokenized)"
    )
    parser.add_argument(
        "--row", type=int, default=None, metavar="N", help="show document N, counted from 0 (default: the first few)"
    )
    parser.add_argument("--documents", type=int, default=3, metavar="N", help="how many documents to show (default: 3)")
    parser.add_argument("--json", action="store_true", help="one object per document: row, ids, roles, trained")
    parser.add_argument(
        "--chart", type=Path, default=None, metavar="PNG", help="write the length histogram as a picture"
    )
    parser.add_argument("--verify", action="store_true", help="read every file and check its SHA-256")


def run(arguments: argparse.Namespace) -> int:
    from tokenize_data.errors import UserError
    from tokenize_data.manifest import dataset_folder
    from tokenize_data.reader import ShardReader

    reader = ShardReader(
        dataset_folder(Path(arguments.tokenized_data_dir), arguments.run_name), verify=arguments.verify
    )
    if arguments.row is not None and not 0 <= arguments.row < len(reader):
        raise UserError(f"--row {arguments.row}: {reader.folder} has documents 0 to {len(reader) - 1}")
    if arguments.json:
        return _print_json(reader, arguments.row)
    return _show(reader, arguments)


def _print_json(reader, row: int | None) -> int:  # type: ignore[no-untyped-def]  # its type would be a slow import
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


def _show(reader, arguments: argparse.Namespace) -> int:  # type: ignore[no-untyped-def]
    from rich.console import Console
    from tokenizers import Tokenizer

    from sft.observe import documents, lengths
    from tokenize_data import describe

    console = Console(highlight=False, soft_wrap=True)
    backend = Tokenizer.from_file(str(reader.folder / reader.manifest.tokenizer["folder"] / "tokenizer.json"))
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
    without = int((reader.trained == 0).sum())
    nothing = [f"{without:,} documents have no trained token: they cost time and teach nothing"] if without else []
    for warning in [*nothing, *describe.warnings(reader.manifest)]:
        console.print(f"warning: {warning}", style="yellow")
    return 0
