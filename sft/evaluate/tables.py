"""scores.json as tables: terminal, CSV, XLSX, HTML. One line per data set and score, one column per model."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.evaluate.scores import LOWER_IS_BETTER, NAMES, PERCENT
from tokenize_data.errors import UserError

SURE = 0.05  # a difference with a smaller p is significant


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model's score. The last three fields are None for the base, or without a base."""

    value: float
    low: float
    high: float
    count: int
    difference: float | None = None
    p: float | None = None
    is_better: bool | None = None  # significantly better, or significantly worse


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the table: one score of one data set."""

    dataset: str
    measure: str
    cells: dict[str, Cell]  # by model

    @property
    def name(self) -> str:
        return NAMES.get(self.measure, self.measure)


def lines_of(summary: Mapping[str, Any]) -> list[Line]:
    models = summary["models"]
    found = []
    for dataset in dict.fromkeys(name for model in models for name in model["datasets"]):
        tables = {model["label"]: model["datasets"][dataset] for model in models if dataset in model["datasets"]}
        for measure in [key for key in NAMES if any(key in table["scores"] for table in tables.values())]:
            cells = {label: _cell(table, measure) for label, table in tables.items() if measure in table["scores"]}
            found.append(Line(dataset=dataset, measure=measure, cells=cells))
    return found


def terminal(summary: Mapping[str, Any]) -> Any:
    """A table for rich."""
    from rich.table import Table
    from rich.text import Text

    labels = [model["label"] for model in summary["models"]]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("data", "score"):
        table.add_column(heading, overflow="fold")
    for label in labels:
        table.add_column(label + (" (base)" if label == summary["base"] else ""), justify="right", overflow="fold")
        if summary["base"] is not None and label != summary["base"]:
            table.add_column("difference", justify="right")
    table.add_column("rows", justify="right")
    before = None
    for line in lines_of(summary):
        row: list[Any] = [line.dataset if line.dataset != before else "", line.name]
        before = line.dataset
        for label in labels:
            cell = line.cells.get(label)
            row.append(f"{_number(line, cell.value)} {_interval(line, cell)}" if cell else "")
            if summary["base"] is not None and label != summary["base"]:
                style = {True: "green", False: "red", None: "dim"}[cell.is_better if cell else None]
                row.append(Text(_difference(line, cell) if cell else "", style=style))
        row.append(f"{max(cell.count for cell in line.cells.values()):,}")
        table.add_row(*row)
    return table


def as_csv(summary: Mapping[str, Any]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows(_plain_rows(summary))
    return stream.getvalue()


def write_xlsx(summary: Mapping[str, Any], path: Path) -> None:
    try:
        from openpyxl import Workbook
        from openpyxl.styles import Font
    except ImportError as error:
        raise UserError("comparison.xlsx needs openpyxl: pip install 'megasft[evaluate]'") from error
    book: Any = Workbook()
    sheet = book.active
    sheet.title = "scores"
    for row in _plain_rows(summary):
        sheet.append(row)
    for cell in sheet[1]:
        cell.font = Font(bold=True)
    sheet.freeze_panes = "C2"
    for column in sheet.columns:
        sheet.column_dimensions[column[0].column_letter].width = min(
            40, 3 + max(len(str(cell.value or "")) for cell in column)
        )
    try:
        book.save(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}: close it elsewhere, or give another --out"
        ) from error


def as_html(summary: Mapping[str, Any]) -> str:
    """The table as an HTML page."""
    labels = [model["label"] for model in summary["models"]]
    base = summary["base"]
    heads = ["data", "score"]
    for label in labels:
        heads += [label + (" (base)" if label == base else "")] + (
            ["difference"] if base is not None and label != base else []
        )
    rows = []
    for line in lines_of(summary):
        cells = [_td(line.dataset), _td(line.name)]
        for label in labels:
            cell = line.cells.get(label)
            cells.append(_td(f"{_number(line, cell.value)} {_interval(line, cell)}" if cell else "", "n"))
            if base is not None and label != base:
                kind = {True: "n up", False: "n down", None: "n"}[cell.is_better if cell else None]
                cells.append(_td(_difference(line, cell) if cell else "", kind))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "\n".join(rows)
    note = "Intervals: 95 %, bootstrap. p: paired bootstrap, two-sided; coloured where below 0.05."
    return (
        '<!doctype html><html lang="en"><meta '
        'charset="utf-8"><title>Comparison</title><style>:root{color-scheme:light dark}'
        "body{font:15px system-ui,sans-serif;margin:2rem}table{border-collapse:collapse}th,td{padding:.3rem "
        ".8rem;text-align:left;"
        "border-bottom:1px solid "
        "#8884}.n{text-align:right;font-variant-numeric:tabular-nums}.up{color:#2e9e4f}.down{color:#d64545}"
        f"</style><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table><p>{note}</p></html>\n"
    )


def _plain_rows(summary: Mapping[str, Any]) -> list[list[Any]]:
    labels = [model["label"] for model in summary["models"]]
    heads = ["data", "score", "rows"]
    for label in labels:
        heads += [label, f"{label}: low", f"{label}: high"]
        heads += [f"{label}: difference", f"{label}: p"] if summary["base"] not in (None, label) else []
    rows: list[list[Any]] = [[_harmless(head) for head in heads]]
    for line in lines_of(summary):
        row: list[Any] = [_harmless(line.dataset), line.name, max(cell.count for cell in line.cells.values())]
        for label in labels:
            cell = line.cells.get(label)
            row += [_finite(value) for value in (cell.value, cell.low, cell.high)] if cell else [None] * 3
            if summary["base"] not in (None, label):
                row += [_finite(cell.difference), cell.p] if cell else [None] * 2
        rows.append(row)
    return rows


def _cell(table: Mapping[str, Any], measure: str) -> Cell:
    score, found = table["scores"][measure], table.get("differences", {}).get(measure)
    if found is None:
        return Cell(**score)
    is_sure = found["p"] < SURE and found["value"] != 0
    is_up = (found["value"] < 0) if measure in LOWER_IS_BETTER else found["value"] > 0
    return Cell(**score, difference=found["value"], p=found["p"], is_better=is_up if is_sure else None)


def _scale(line: Line) -> float:
    return 100.0 if line.measure in PERCENT else 1.0


def _number(line: Line, value: float) -> str:
    value = value * _scale(line)
    return f"{value:,.2f}" if line.measure in LOWER_IS_BETTER else f"{value:.1f}"


def _interval(line: Line, cell: Cell) -> str:
    return f"[{_number(line, cell.low)}, {_number(line, cell.high)}]"


def _difference(line: Line, cell: Cell) -> str:
    if cell.difference is None or cell.p is None:
        return ""
    digits = 2 if line.measure in LOWER_IS_BETTER else 1
    return (
        f"{cell.difference * _scale(line):+,.{digits}f} (p {'<' if cell.p <= 0.002 else '='} {max(cell.p, 0.002):.3g})"
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _harmless(text: str) -> str:
    """Escape text that spreadsheets would take for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def _td(text: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<td{attribute}>{html.escape(text)}</td>"
