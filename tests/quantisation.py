"""Formats of frozen weights, by their bits."""

from __future__ import annotations

from sft.config.quantisation import QUANTISATIONS, Quantisation


def of_bits(bits: int | None) -> Quantisation | None:
    return next(one for one in QUANTISATIONS.values() if one.bits == bits) if bits else None
