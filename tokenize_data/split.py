"""Splits training rows for validation, drawn by seed. Each row, or each group of rows with the same value of a key,
gets a number from the seed; the smallest ones are held out. This depends on the number alone, so processes need no
list of rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokenize_data import paths
from tokenize_data.drawn import Drawn
from tokenize_data.errors import RowError, UserError
from tokenize_data.json_lines import Row, parse_line
from tokenize_data.sources import Source

_SHARE = re.compile(r"(\d+(?:\.\d+)?)%|(\d+)")


@dataclass(frozen=True, kw_only=True)
class Split:
    """The requested split."""

    wanted: str  # "5%", or a number of rows
    seed: int
    group: str | None = None

    def facts(self) -> dict[str, Any]:
        return {"val": self.wanted, "seed": self.seed, "group": self.group}

    def num_rows(self, total: int) -> int:
        found = _SHARE.fullmatch(self.wanted)
        assert found is not None
        return max(round(float(found.group(1)) / 100 * total), 1) if found.group(1) else int(found.group(2))

    @property
    def flags(self) -> str:
        return f"--val {self.wanted}" + (f" --val_group {self.group}" if self.group else "")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One side of a split."""

    split: Split
    threshold: int
    is_validation: bool

    def has(self, source: int, line: int, row: Row | None) -> bool:
        """Whether a row belongs to this side. `row` is needed if groups are kept together."""
        if self.split.group:
            if row is None:
                return not self.is_validation  # an invalid row is rejected on the training side
            number = _of_group(self.split, row)
        else:
            number = int(numbers_of(self.split.seed, source, [line])[0])
        return (number <= self.threshold) == self.is_validation


def share_of(val: Sequence[str], val_group: str | None) -> str | None:
    """Parse --val as a share such as 5%, or a number of rows; None if it names files."""
    asked = [value for value in val if _SHARE.fullmatch(value)]
    if len(asked) != len(val) or len(asked) > 1:
        if asked:
            raise UserError(f"--val {' '.join(val)}: give files, or one share such as 5% or 500 of the training data")
        if val_group is not None:
            raise UserError("--val_group keeps rows together in a split of --data: give --val a share such as 5%")
        return None
    if not asked:
        if val_group is not None:
            raise UserError("--val_group keeps rows together in a split of --data: give --val a share such as 5%")
        return None
    (text,) = asked
    if not 0 < float(text.removesuffix("%")) < (100 if text.endswith("%") else float("inf")):
        raise UserError(f"--val {text}: give a share between 0% and 100%, or a number of rows")
    return text


def part_of(split: Split, sources: Sequence[Source], is_validation: bool, folder: Path) -> Part:
    """Reads all rows once. Their numbers lie in `folder` meanwhile."""
    with Drawn(folder) as drawn:
        for numbers in _groups(split, sources) if split.group else _lines(split, sources):
            drawn.add(numbers)
        total = len(drawn)
        if split.group and not total:
            raise UserError(f"no row has the key '{split.group}', which --val_group names{_why(split, sources)}")
        kept = split.num_rows(total)
        if kept >= total:
            raise UserError(f"{split.flags} of {total:,} rows leaves nothing to train: ask for less")
        if split.group and drawn.are_equal:
            raise UserError(
                f"{split.flags}: all {total:,} rows have the same '{split.group}': group them by another key"
            )
        threshold = drawn.smallest_groups(kept) if split.group else drawn.smallest(kept)
    return Part(split=split, threshold=threshold, is_validation=is_validation)


def _lines(split: Split, sources: Sequence[Source]) -> Iterator[np.ndarray]:
    for index, source in enumerate(sources):
        for chunk in source.chunks(index):
            yield numbers_of(split.seed, index, [line for line, _ in chunk.rows()])


def _groups(split: Split, sources: Sequence[Source]) -> Iterator[np.ndarray]:
    """Read the groups. Invalid rows are rejected later."""
    for index, source in enumerate(sources):
        for chunk in source.chunks(index):
            found = []
            for _, raw in chunk.rows():
                with contextlib.suppress(RowError):
                    found.append(_of_group(split, parse_line(raw) if isinstance(raw, bytes) else {}))
            yield np.array(found, np.uint64)


def _why(split: Split, sources: Sequence[Source]) -> str:
    """Describe what the first row has instead of the key."""
    for index, source in enumerate(sources):
        for chunk in source.chunks(index):
            for line, raw in chunk.rows():
                try:
                    _of_group(split, parse_line(raw) if isinstance(raw, bytes) else {})
                except RowError as error:
                    return f": {source.place(line)}: {error}"
    return ": name another one"


def _of_group(split: Split, row: Row) -> int:
    assert split.group is not None
    text = json.dumps([split.seed, paths.find(row, split.group, "val_group")], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def numbers_of(seed: int, source: int, lines: Sequence[int]) -> np.ndarray:
    """Hash line numbers evenly by the finaliser of SplitMix64."""
    with np.errstate(over="ignore"):
        x = np.asarray(lines, np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + source * 0xD1B54A32D192ED03) % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        result: np.ndarray = x ^ (x >> np.uint64(31))
    return result
