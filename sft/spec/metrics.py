"""metrics.jsonl: one JSON object per iteration; progress bar, trackers, chart and report all read it."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft.spec.run_folder import replace_file
from tokenize_data.errors import FailedError, UserError
from tokenize_data.files import append_private

_MOST_ITERATIONS = 1 << 53


class MetricsFile:
    """Appends one line per iteration, flushed to the operating system before `append` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write one record. Returns it as written, for the progress bar and the trackers."""
        written = valid_record(record)
        line = json.dumps(written, allow_nan=False, ensure_ascii=True).encode() + b"\n"
        try:
            with append_private(self._path) as file:
                file.write(line if _ends_a_line(file) else b"\n" + line)
        except OSError as error:
            raise FailedError(
                f"cannot write {self._path}: {error.strerror}: check the folder and the disk, then run again to resume"
            ) from error
        return written

    def rewind(self, iteration: int) -> int:
        """Drop records after `iteration` and a torn line, before a resume. Returns the number of records kept."""
        kept = [record for record in read(self._path) if record["iteration"] <= iteration]
        if self._path.exists():
            replace_file(self._path, "".join(json.dumps(record, ensure_ascii=True) + "\n" for record in kept))
        return len(kept)


def read(path: Path) -> list[dict[str, Any]]:
    """The records in the order written. Damaged lines, as a crash may leave them, are skipped."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: give the folder of a run") from error
    return [record for line in lines if (record := _parsed(line)) is not None]


def valid_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Convert to plain numbers; values that JSON cannot hold become null, and a note says which."""
    values = {key: value.item() if hasattr(value, "item") else value for key, value in record.items()}
    odd = {key: value for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
    notes = [values["note"]] if values.get("note") else []
    notes += [
        f"{key} is {'NaN' if math.isnan(value) else 'Infinity' if value > 0 else '-Infinity'}"
        for key, value in odd.items()
    ]
    values |= dict.fromkeys(odd)
    return values | ({"note": ", ".join(notes)} if notes else {})


def number(record: Mapping[str, Any], key: str) -> float | None:
    """A finite number from the record, or None."""
    value = record.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    with contextlib.suppress(OverflowError):
        return float(value) if math.isfinite(value) else None
    return None


def _ends_a_line(file: Any) -> bool:
    if file.seek(0, 2) == 0:
        return True
    file.seek(-1, 2)
    return bool(file.read(1) == b"\n")


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Parse a record, which must have its iteration."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    number = record.get("iteration") if isinstance(record, dict) else None
    return (
        record if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < _MOST_ITERATIONS else None
    )
