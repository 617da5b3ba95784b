"""metrics.jsonl: one object an iteration, the only source of the progress bar, the trackers, the chart and the
report.
"""

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
    """Grows by one line an iteration, each of them with the operating system before `append` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write one record; returns it as written, to be handed to the progress bar and the trackers."""
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
        """Before a resume after `iteration`: drop what came later, and a torn line. Returns the number of records that
        stay.
        """
        kept = [record for record in read(self._path) if record["iteration"] <= iteration]
        if self._path.exists():
            replace_file(self._path, "".join(json.dumps(record, ensure_ascii=True) + "\n" for record in kept))
        return len(kept)


def read(path: Path) -> list[dict[str, Any]]:
    """The records, in the order written; none where there is no file. A line that is none, as a crash may leave it, is
    left out.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: give the folder of a run") from error
    return [record for line in lines if (record := _parsed(line)) is not None]


def valid_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Plain numbers, and null for those that JSON cannot hold; the note says which they were."""
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
    """A finite number of the record, or None."""
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
    """A record, which has the number of its iteration."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    number = record.get("iteration") if isinstance(record, dict) else None
    return (
        record if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < _MOST_ITERATIONS else None
    )
