"""Few combinations in which every two values of any two axes meet: a pairwise covering array, the same every time."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def covering(axes: Mapping[str, Sequence[Any]], is_allowed: Callable[[Row], bool]) -> list[Row]:
    """Greedy: each row starts from a pair that is missing, and takes for every other axis the value that adds the most
    missing pairs.

    `is_allowed` is asked about partial rows too; it must not forbid a value that it needs to see another axis for.
    """
    missing = {pair for pair in _all_pairs(axes) if is_allowed(dict(pair))}
    rows: list[Row] = []
    used: Counter[tuple[str, Any]] = Counter()
    while missing:
        row = dict(min(missing, key=repr))
        for axis in sorted(axes.keys() - row.keys(), key=lambda name: (-len(axes[name]), name)):
            choices = [value for value in axes[axis] if is_allowed({**row, axis: value})]
            gains = [sum(_pair(axis, value, *other) in missing for other in row.items()) for value in choices]
            row[axis] = max(zip(choices, gains, strict=True), key=lambda choice: (choice[1], -used[axis, choice[0]]))[0]
        rows.append({axis: row[axis] for axis in axes})
        used.update(row.items())
        missing -= pairs_of(row)
    return rows


def pairs_of(row: Row) -> set[Pair]:
    return {_pair(*one, *other) for one, other in itertools.combinations(row.items(), 2)}


def often_enough(rows: Sequence[Row], times: int) -> list[Row]:
    """A few of the rows in which every value of every axis appears at least so many times."""
    wanted = dict.fromkeys(((axis, value) for row in rows for axis, value in row.items()), times)
    chosen: list[Row] = []
    left = list(rows)
    while any(count > 0 for count in wanted.values()):
        best = max(left, key=lambda row: sum(wanted[item] for item in row.items() if wanted[item] > 0))
        left.remove(best)
        chosen.append(best)
        for item in best.items():
            wanted[item] -= 1
    return chosen


def _all_pairs(axes: Mapping[str, Sequence[Any]]) -> set[Pair]:
    return {
        _pair(one, a, other, b)
        for one, other in itertools.combinations(axes, 2)
        for a in axes[one]
        for b in axes[other]
    }


def _pair(one: str, a: Any, other: str, b: Any) -> Pair:
    return ((one, a), (other, b)) if one < other else ((other, b), (one, a))
