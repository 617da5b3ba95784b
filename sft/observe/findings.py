"""Prints what the checks of a data set found."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from tokenize_data import describe
from tokenize_data.checks.check import Report
from tokenize_data.reader import ShardReader

_LINE_EVERY_SECONDS = 10.0


def show(console: Console, report: Report) -> None:
    console.print(Rule("checks", align="left", style="dim"))
    if report.frequent:
        console.print(_frequent(report))
    for finding in report.findings:
        word, style = ("warning", "yellow") if finding.is_warning else ("note", "dim")
        console.print(Text(f"{word}: {finding.line()}", style=style))
    if not report.findings:
        console.print("nothing found")
    console.print(Text(report.scope(), style="dim"))
    for skipped in report.skipped:
        console.print(Text(f"not checked: {skipped}", style="dim"))


def of_manifest(reader: ShardReader, report: Report | None) -> list[str]:
    """The tokeniser's warnings that no check has reported."""
    without = int((reader.trained == 0).sum())
    nothing = [f"{without:,} documents have no trained token: they cost time and teach nothing"] if without else []
    found = [*nothing, *describe.warnings(reader.manifest)]
    names = {finding.name for finding in report.findings} if report is not None else set()
    said = {"cut documents": "were cut at", "special tokens in texts": "special tokens within their own texts"}
    return [line for line in found if not any(name in names and words in line for name, words in said.items())]


def _frequent(report: Report) -> Table:
    table = Table("most frequent answers", "share", box=None, padding=(0, 2, 0, 0), header_style="dim")
    validated = any(answer.validation_share is not None for answer in report.frequent)
    if validated:
        table.add_column("of the validation set")
    for answer in report.frequent:
        line = " ".join(answer.text.split())
        cells: list[Text | str] = [Text(line if len(line) <= 60 else line[:59] + "…"), f"{answer.share:.1%}"]
        table.add_row(*cells, *([f"{answer.validation_share or 0.0:.1%}"] if validated else []))
    return table


class CheckProgress:
    """Progress of the checks: a bar on a terminal, otherwise occasional lines."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("checking", total=None)

    def __enter__(self) -> CheckProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, name: str, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=name, completed=done, total=total)
        elif time.monotonic() - self._last > _LINE_EVERY_SECONDS:
            self._last = time.monotonic()
            sys.stderr.write(f"sft inspect: {name}: {done:,} of {total:,}\n")
            sys.stderr.flush()
