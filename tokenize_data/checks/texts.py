"""Decodes questions and answers of all documents, or of an evenly spread sample."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from tokenize_data.checks.digests import Step, last_answer
from tokenize_data.reader import ShardReader
from tokenize_data.rendered import USER

_AT_ONCE = 1024
_SPACES = re.compile(r"\s+")


@dataclass(frozen=True)
class Text:
    """The last question and its answer. `is_cut`: --seq cut the document."""

    document: int | None
    place: str
    question: str
    answer: str
    row: int = -1
    is_cut: bool = False

    @property
    def main(self) -> str:
        """The text to compare: the question, or plain text itself."""
        return self.question or self.answer


def sample(count: int, most: int) -> np.ndarray:
    """At most `most` of the numbers below `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64)) if count else np.empty(0, np.int64)


def backend_of(reader: ShardReader) -> Tokenizer:
    return Tokenizer.from_file(str(reader.folder / reader.manifest.tokenizer["folder"] / "tokenizer.json"))


def texts_of(reader: ShardReader, backend: Tokenizer, numbers: np.ndarray, step: Step | None = None) -> list[Text]:
    found: list[Text] = []
    for first in range(0, len(numbers), _AT_ONCE):
        some = [int(number) for number in numbers[first : first + _AT_ONCE]]
        questions, answers = zip(*(_ids(reader, number) for number in some), strict=True)
        decoded = zip(some, _decode(backend, questions), _decode(backend, answers), strict=True)
        found += [
            Text(
                number,
                reader.place_text(number),
                question,
                answer,
                int(reader.rows_of(slice(number, number + 1))[0]),
                bool(reader.cut_at_right[number]),
            )
            for number, question, answer in decoded
        ]
        if step is not None:
            step(first, len(numbers))
    return found


def normal(text: str) -> str:
    """Normalise case and white space."""
    return _SPACES.sub(" ", text).strip().casefold()


def _ids(reader: ShardReader, number: int) -> tuple[list[int], list[int]]:
    """Returns (ids of the last question, ids of the last answer)."""
    document = reader[number]
    answer = last_answer(document)
    ends = np.cumsum(document.run_lengths)
    asked = np.flatnonzero((document.run_roles == USER) & (ends <= answer.start))
    question: list[int] = []
    if len(asked):
        run = int(asked[-1])
        question = document.ids[int(ends[run] - document.run_lengths[run]) : int(ends[run])].tolist()
    return question, document.ids[answer].tolist()


def _decode(backend: Tokenizer, ids: Sequence[list[int]]) -> list[str]:
    return [text.strip() for text in backend.decode_batch(list(ids), skip_special_tokens=True)]
