"""Counts rows and tokens, and sets bad rows aside."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from tokenize_data.convert import Converted, Reject
from tokenize_data.errors import RowError, UserError
from tokenize_data.files import as_json, open_private
from tokenize_data.rendered import ROLE_NAMES
from tokenize_data.sources import Source

_MOST_KINDS = 1000  # limit of distinct reasons: those that quote a row may be as many as the rows
_OTHERS = "other reasons"


class Tally:
    """Counts rows and sets bad ones aside; beyond the limit, the first bad row is the error."""

    def __init__(self, max_bad_rows: int, sources: Sequence[Source], path: Path) -> None:
        self._limit, self._sources, self._path = max_bad_rows, sources, path
        self._file: IO[bytes] | None = None
        self._first: str | None = None
        self.read = self.accepted = self.left_out = self.rejected = 0
        self.documents = self.trained = self.cut = self.shortened = 0
        self.injected = self.open = self.double_bos = self.without_bos = 0
        self.role_tokens = [0] * len(ROLE_NAMES)
        self.reasons: Counter[str] = Counter()
        self.rows_of_source = [0] * len(sources)

    def add(self, converted: Converted) -> None:
        self.read += converted.read
        self.accepted += converted.accepted
        self.left_out += converted.left_out
        self.rows_of_source[converted.chunk.source] += converted.accepted
        self.rejected += len(converted.rejects)
        for reject in converted.rejects:
            self._reject(self._sources[converted.chunk.source], reject)
        self.documents += len(converted.lengths)
        self.trained += sum(converted.trained)
        self.cut += sum(1 for cut in converted.cut if cut) - converted.num_shortened
        self.shortened += converted.num_shortened
        self.injected += converted.num_injected
        self.open += converted.num_open
        self.double_bos += converted.num_double_bos
        self.without_bos += converted.num_without_bos
        self.role_tokens = [a + b for a, b in zip(self.role_tokens, converted.num_role_tokens, strict=True)]

    def _reject(self, source: Source, reject: Reject) -> None:
        place = source.place(reject.line)
        self._first = self._first or f"{place}: {reject.reason}"
        if self.rejected > self._limit:
            if self._limit == 0:
                raise RowError(f"{self._first} (--max_bad_rows N sets up to N such rows aside; {self.counts()})")
            raise RowError(
                f"more than {self._limit} bad rows (--max_bad_rows), the first is {self._first} ({self.counts()})"
            )
        if self._file is None:
            self._file = open_private(self._path)
        row = {
            "file": source.name,
            source.unit: reject.line,
            "reason": reject.reason,
            "row": reject.raw.decode(errors="backslashreplace"),
        }
        self._file.write(as_json(row) + b"\n")
        kind = _kind(reject.reason)
        self.reasons[kind if kind in self.reasons or len(self.reasons) < _MOST_KINDS else _OTHERS] += 1

    def counts(self) -> str:
        return f"{self.read:,} rows read = {self.accepted:,} accepted + {self.rejected:,} rejected"

    def finish(self) -> None:
        assert self.read == self.accepted + self.rejected, self.counts()
        if self.documents == 0:
            names = ", ".join(source.name for source in self._sources)
            first = f"; the first is {self._first}" if self._first else ""
            raise UserError(f"{names}: no row can be used ({self.counts()}){first}: give at least one good row")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def rows(self) -> dict[str, int]:
        return {"read": self.read, "accepted": self.accepted, "rejected": self.rejected, "left_out": self.left_out}


def _kind(reason: str) -> str:
    """A reason without its values, for counting."""
    return re.sub(r"\d[\d,.]*", "N", re.split(r": | \(|; ", reason)[0])[:60]
