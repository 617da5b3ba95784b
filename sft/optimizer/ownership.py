"""Who owns what: each data-parallel replica updates a share of every stage's weights. Arithmetic on shapes, the same on
every process.

A large tensor is split by rows, equally many for each replica. A small one, or one that an optimizer needs whole, has
one owner. What is exchanged together is a parcel: one split tensor, or several whole ones, balanced by size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

_SMALL_ELEMENTS = 2**16  # a smaller exchange takes no less time
_LEAST_ROWS = 8  # for each replica, so that rounding up costs little
_BUNDLE_ELEMENTS = 2**25  # size of a bundle of small tensors


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """Tensors that are exchanged together: a single one split by rows, or `owners` of whole ones."""

    names: tuple[str, ...]
    owners: tuple[int, ...] | None = None

    def rows_of(self, name: str, num_rows: int, replicas: int, replica: int) -> range:
        """Return the rows of the tensor that a replica owns."""
        if self.owners is None:
            return split_rows(num_rows, replicas, replica)
        return range(num_rows if self.owners[self.names.index(name)] == replica else 0)


def split_rows(num_rows: int, replicas: int, replica: int) -> range:
    """Return a replica's rows: an equal share, rounded up; the last replicas may get fewer."""
    each = -(-num_rows // replicas)
    return range(min(replica * each, num_rows), min((replica + 1) * each, num_rows))


def num_rows_of(shape: Sequence[int]) -> int:
    return shape[0] if shape else 1


def parcels(
    shapes: Mapping[str, Sequence[int]],
    replicas: int,
    *,
    whole: Collection[str] = (),
    shared: Collection[str] = (),
    last: Collection[str] = (),
) -> list[Parcel]:
    """In the order in which gradients are complete: the last layers' first, but those in `last` after all others.

    `whole` tensors are never split. Of `shared` ones several stages hold the same, so that what they depend on is their
    own shape alone.
    """
    backwards = list(shapes)[::-1]
    ordered = [name for name in backwards if name not in last] + [name for name in backwards if name in last]
    made: list[Parcel] = []
    loads = [0] * replicas
    waiting: list[str] = []
    for name in ordered:
        if waiting and (name in last) != (waiting[-1] in last):
            made.append(_bundle(waiting, shapes, loads))
            waiting = []
        if name in shared or (name not in whole and _is_worth_splitting(shapes[name], replicas)):
            made.append(Parcel(names=(name,), owners=(0,) if name in whole else None))
            continue
        waiting.append(name)
        if len(waiting) >= 4 * replicas and sum(math.prod(shapes[one]) for one in waiting) >= _BUNDLE_ELEMENTS:
            made.append(_bundle(waiting, shapes, loads))
            waiting = []
    return made + ([_bundle(waiting, shapes, loads)] if waiting else [])


def _is_worth_splitting(shape: Sequence[int], replicas: int) -> bool:
    rows = num_rows_of(shape)
    return math.prod(shape) >= _SMALL_ELEMENTS and (rows % replicas == 0 or rows >= _LEAST_ROWS * replicas)


def _bundle(names: Sequence[str], shapes: Mapping[str, Sequence[int]], loads: list[int]) -> Parcel:
    """The largest first, each to the replica with the least so far, bundles before this one included."""
    owners: dict[str, int] = {}
    for name in sorted(names, key=lambda name: (-math.prod(shapes[name]), name)):
        owners[name] = min(range(len(loads)), key=lambda replica: (loads[replica], replica))
        loads[owners[name]] += math.prod(shapes[name])
    return Parcel(names=tuple(names), owners=tuple(owners[name] for name in names))
