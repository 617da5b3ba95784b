"""Decides before conversion: the format of each data set, and which of its rows are taken."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tokenize_data.convert import Choice
from tokenize_data.dataset import DatasetSpec
from tokenize_data.drawn import Drawn
from tokenize_data.errors import RowError, UserError
from tokenize_data.formats.interface import format_of
from tokenize_data.json_lines import Row, parse_line
from tokenize_data.records import recognise
from tokenize_data.sources import Source
from tokenize_data.split import Part, numbers_of

_NUM_ROWS_LOOKED_AT = 16
_OF_WEIGHTS = 0x5DEECE66D


def recognise_format(spec: DatasetSpec, group: Sequence[Source]) -> tuple[str, str]:
    """Returns (the format's name, a line with the format and the keys that identify it)."""
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


def choose_rows(
    spec: DatasetSpec, group: Sequence[Source], seed: int, scratch: Path, part: Part | None = None, first: int = 0
) -> Iterator[Choice]:
    """One choice for each file of a data set: all rows, a weight, or `samples` of them drawn by seed; of those on one
    side of a split. `first` is the number of the first file among those of all data sets; `scratch` a folder.
    """
    if spec.samples is None:
        own, threshold = seed ^ _OF_WEIGHTS, -1  # other numbers than those of a split
        if spec.weight != int(spec.weight):
            threshold = _threshold(spec.weight % 1, group, own, scratch, part, first)
        for index in range(len(group)):
            yield Choice(weight=spec.weight, threshold=threshold, seed=own, part=part, source=first + index)
        return
    rows = [
        np.fromiter((number for lines in _row_numbers(source, part, first + at) for number in lines), dtype=np.int64)
        for at, source in enumerate(group)
    ]
    total = sum(len(lines) for lines in rows)
    if spec.samples > total:
        raise UserError(
            f"data set '{spec.name}' has {total:,} rows{' to train' if part else ''}, fewer than samples "
            f"{spec.samples:,}: lower samples or leave it out"
        )
    chosen = np.sort(np.random.default_rng(seed).choice(total, spec.samples, replace=False))
    at = 0
    for index, lines in enumerate(rows):
        mine = chosen[(chosen >= at) & (chosen < at + len(lines))] - at
        at += len(lines)
        yield Choice(rows=frozenset(lines[mine].tolist()), part=part, source=first + index)


def _threshold(share: float, group: Sequence[Source], seed: int, scratch: Path, part: Part | None, first: int) -> int:
    """The number up to which rows get one copy more, so that exactly this share of them does. Reads all rows once."""
    with Drawn(scratch) as drawn:
        for index, source in enumerate(group, first):
            for lines in _row_numbers(source, part, index):
                drawn.add(numbers_of(seed, index, lines))
        count = round(share * len(drawn))
        return drawn.smallest(count) if count else -1


def _row_numbers(source: Source, part: Part | None, index: int) -> Iterator[list[int]]:
    """The numbers of a file's rows that are on this side of a split, chunk by chunk."""
    for chunk in source.chunks(0):
        yield [
            number
            for number, raw in chunk.rows()
            if part is None or part.has(index, number, _parsed(raw) if part.split.group else None)
        ]


def _parsed(raw: Any) -> Row | None:
    """A row that cannot be used is chosen like any other, and refused later."""
    with contextlib.suppress(RowError):
        return parse_line(raw) if isinstance(raw, bytes) else None
    return None
