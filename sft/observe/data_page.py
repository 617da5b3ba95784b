"""A data set as one self-contained HTML page: findings, lengths, coloured samples."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sft.observe.documents import pieces
from sft.observe.findings import of_manifest
from sft.observe.lengths import bins
from tokenize_data.checks.check import Report
from tokenize_data.checks.private import hidden
from tokenize_data.checks.texts import sample
from tokenize_data.errors import UserError
from tokenize_data.files import replace_private
from tokenize_data.reader import ShardReader
from tokenize_data.rendered import ROLE_NAMES

_NUM_SAMPLES, _MOST_CHARACTERS, _NUM_BINS = 8, 4000, 32


def write(reader: ShardReader, backend: Tokenizer, report: Report, file: Path) -> None:
    """Write the page, readable by its owner only, since it shows rows."""
    page = resources.files("sft.observe").joinpath("data.html").read_text()
    content = json.dumps(facts(reader, backend, report), ensure_ascii=False)
    filled = page.replace('"@data@"', content.replace("<", "\\u003c").replace("\u2028", " ").replace("\u2029", " "))
    try:
        replace_private(file, filled.encode(errors="replace"), file.with_name(f".{file.name}.part"))
    except OSError as error:
        raise UserError(f"--page {file}: {error.strerror or error}: give the path of an .html file") from error


def facts(reader: ShardReader, backend: Tokenizer, report: Report) -> dict[str, Any]:
    """The page's content as data."""
    manifest = reader.manifest
    examples = [example.document for finding in report.findings for example in finding.examples[:2]]
    shown = list(sample(len(reader), _NUM_SAMPLES).tolist())
    chosen = dict.fromkeys([*shown, *[number for number in examples if number is not None]])
    return {
        "name": manifest.run_name,
        "created": manifest.created,
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "trained": manifest.trained_tokens,
        "seq": manifest.seq,
        "rows": manifest.rows,
        "roles": manifest.role_tokens,
        "template": manifest.template["name"],
        "files": [
            {"name": entry["name"], "rows": entry["rows"], "format": dataset["format"]}
            for dataset in manifest.datasets
            for entry in dataset["files"]
        ],
        "lengths": [
            _histogram("tokens of a document", reader.lengths),
            _histogram("tokens before the answer", reader.lengths - reader.trained),
            _histogram("trained tokens of a document", reader.trained),
        ],
        "frequent": [
            {"text": hidden(answer.text[:200]), "share": answer.share, "validation": answer.validation_share}
            for answer in report.frequent
        ],
        "findings": [
            {
                "name": finding.name,
                "text": finding.text,
                "warning": finding.is_warning,
                "examples": [
                    {"place": str(example), "document": example.document if example.document in chosen else None}
                    for example in finding.examples
                ],
            }
            for finding in report.findings
        ],
        "warnings": of_manifest(reader, report),
        "scope": report.scope(),
        "skipped": list(report.skipped),
        "samples": [_sample(reader, backend, number) for number in chosen],
    }


def _sample(reader: ShardReader, backend: Tokenizer, number: int) -> dict[str, Any]:
    parts, left = [], _MOST_CHARACTERS
    for text, role in pieces(reader[number], backend):
        if left <= 0:
            break
        parts.append([ROLE_NAMES[role], hidden(text[:left])])
        left -= len(text)
    return {
        "document": number,
        "place": reader.place_text(number),
        "tokens": int(reader.lengths[number]),
        "trained": int(reader.trained[number]),
        "parts": parts,
        "more": left <= 0,
    }


def _histogram(title: str, values: np.ndarray) -> dict[str, Any]:
    values = values.astype(np.int64)
    counts, edges = bins(values, _NUM_BINS)
    low, middle, high = np.percentile(values, [5, 50, 95])
    return {
        "title": title,
        "counts": counts.tolist(),
        "edges": edges.tolist(),
        "low": int(low),
        "median": int(middle),
        "high": int(high),
        "longest": int(values.max()),
    }
