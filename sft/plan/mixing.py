"""How much of each data set an epoch takes: by size, by a temperature, or by shares that the user sets."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenize_data.errors import UserError


@dataclass(frozen=True, kw_only=True)
class MixPart:
    """One data set: a range of documents, of which each epoch takes `per_epoch`."""

    name: str
    documents: int
    per_epoch: int

    @property
    def is_whole(self) -> bool:
        return self.documents == self.per_epoch


def mix(sizes: Mapping[str, int], temperature: float, wanted: Sequence[str]) -> tuple[MixPart, ...]:
    """The parts of an epoch, which has as many documents as all data sets together; empty for a single data set."""
    if len(sizes) < 2:
        if wanted or temperature != 1.0:
            flag = f"--mix {' '.join(wanted)}" if wanted else f"--mix_temperature {temperature:g}"
            raise UserError(f"{flag} mixes several data sets, but there is one: list them as datasets: in a recipe")
        return ()
    shares = shares_of(sizes, temperature, _parse(wanted, sizes))
    total = sum(sizes.values())
    counts = _whole(shares, total)
    if short := [name for name, count in counts.items() if count == 0]:
        raise UserError(f"none of {total:,} documents would be of '{short[0]}': give it a larger share with --mix")
    return tuple(MixPart(name=name, documents=sizes[name], per_epoch=counts[name]) for name in sizes)


def shares_of(sizes: Mapping[str, int], temperature: float, wanted: Mapping[str, float]) -> dict[str, float]:
    """The given shares; the others divide the rest by size to the power of 1 / temperature."""
    left = 1.0 - sum(wanted.values())
    weights = {name: size ** (1.0 / temperature) for name, size in sizes.items() if name not in wanted}
    if weights and left <= 1e-9:
        raise UserError(f"--mix leaves nothing for '{next(iter(weights))}': lower the shares")
    if not weights and abs(left) > 1e-6:
        raise UserError(f"--mix: the shares of all data sets add up to {1.0 - left:g}: make it 1")
    total = sum(weights.values())
    return {name: wanted[name] if name in wanted else left * weights[name] / total for name in sizes}


def _parse(wanted: Sequence[str], sizes: Mapping[str, int]) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in wanted:
        name, _, value = text.rpartition("=")
        if name not in sizes:
            close = difflib.get_close_matches(name, list(sizes), n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"the data sets are {', '.join(sizes)}"
            raise UserError(f"--mix {text}: no data set is named '{name}': {hint}")
        share = _number(value)
        if share is None or not 0 < share < 1:
            raise UserError(f"--mix {text}: write a share between 0 and 1, such as {name}=0.3")
        if name in found:
            raise UserError(f"--mix names '{name}' twice: give one share")
        found[name] = share
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _whole(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Round shares to whole numbers that add up to the total."""
    exact = {name: share * total for name, share in shares.items()}
    counts = {name: int(value) for name, value in exact.items()}
    left = total - sum(counts.values())
    for name in sorted(exact, key=lambda name: counts[name] - exact[name])[:left]:
        counts[name] += 1
    return counts
