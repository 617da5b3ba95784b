"""`sft report RUN_DIR`: one HTML page for a run, or for several runs with overlaid curves; live with --watch."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="a run's folder; several are overlaid"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="FILE",
        help="default: report.html of the run; of several, ./report.html",
    )
    parser.add_argument(
        "--watch", action="store_true", help="serve the page on this machine, live, until Ctrl-C; writes no file"
    )
    parser.add_argument(
        "--port", type=int, default=6060, metavar="P", help="port for --watch (default: 6060; 0 for any free one)"
    )


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from sft.observe import report, serve
    from tokenize_data.errors import UserError

    console = Console(highlight=False, soft_wrap=True)
    folders = arguments.run_dirs
    for folder in folders:
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such folder: give a run's folder, such as checkpoints/llama-70-meditron-pubmedqa"
            )
    if not arguments.watch:
        path = arguments.out or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
        report.write_report(folders, path)
        console.print(f"report    {path}")
        return 0
    server = serve.make_server(folders, arguments.port)
    console.print(f"http://127.0.0.1:{server.server_port}/ shows the run live; Ctrl-C stops the server")
    try:
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        return 0
    finally:
        server.server_close()
    return 0
