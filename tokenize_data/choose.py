"""Before the first row is converted: the format of each data set, and which rows of it are taken."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from tokenize_data.convert import Choice
from tokenize_data.dataset import DatasetSpec
from tokenize_data.errors import RowError, UserError
from tokenize_data.formats.interface import format_of
from tokenize_data.json_lines import parse_line
from tokenize_data.records import recognise
from tokenize_data.sources import Source

_NUM_ROWS_LOOKED_AT = 16


def recognise_format(spec: DatasetSpec, group: Sequence[Source]) -> tuple[str, str]:
    """(the format's name, a line that says which it is and by which keys)."""
    rows = []
    for chunk in group[0].chunks(0):
        for _, row in islice(chunk.rows(), _NUM_ROWS_LOOKED_AT):
            with contextlib.suppress(RowError):
                rows += [parse_line(row)] if isinstance(row, bytes) else []
        break
    name = recognise(rows, spec)
    keys = format_of(name).keys(spec)
    given = "given" if spec.format else "recognised"
    return name, f"{', '.join(spec.files)}: format {name} ({keys}), {given}"


def choose_rows(spec: DatasetSpec, group: Sequence[Source], seed: int) -> Iterator[Choice]:
    """One choice for each file of a data set: all rows, a weight, or `samples` of them drawn by seed."""
    if spec.samples is None:
        yield from (Choice(weight=spec.weight, seed=seed + index) for index, _ in enumerate(group))
        return
    rows = [np.array(list(_row_numbers(source)), dtype=np.int64) for source in group]
    total = sum(len(lines) for lines in rows)
    if spec.samples > total:
        raise UserError(
            f"data set '{spec.name}' has {total:,} rows, fewer than samples {spec.samples:,}: lower samples or "
            "leave it out"
        )
    chosen = np.sort(np.random.default_rng(seed).choice(total, spec.samples, replace=False))
    at = 0
    for lines in rows:
        mine = chosen[(chosen >= at) & (chosen < at + len(lines))] - at
        at += len(lines)
        yield Choice(rows=frozenset(lines[mine].tolist()))


def _row_numbers(source: Source) -> Iterator[int]:
    for chunk in source.chunks(0):
        yield from (number for number, _ in chunk.rows())
