"""64-bit hashes of every document, of its question and of its answer: equal hashes are equal tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from tokenize_data.reader import Document, ShardReader
from tokenize_data.rendered import ASSISTANT, SYSTEM, USER

MOST_DOCUMENTS = 1_000_000  # 24 bytes and some 10 microseconds each
Step = Callable[[int, int], None]


@dataclass(frozen=True)
class Digests:
    """Hashes per document. `question` covers everything before the last answer; 0 without a question."""

    whole: np.ndarray
    question: np.ndarray
    answer: np.ndarray
    rows: np.ndarray  # the row that each document was made from

    def __len__(self) -> int:
        return len(self.whole)


def last_answer(document: Document) -> slice:
    """The tokens of the last answer."""
    roles, lengths = (document.run_roles.tolist(), document.run_lengths.tolist())  # few: lists are faster
    run = len(roles) - 1 - roles[::-1].index(ASSISTANT)
    start = sum(lengths[:run])
    return slice(start, start + lengths[run])


def digests_of(reader: ShardReader, step: Step | None = None) -> Digests:
    """Digests of the first million documents."""
    count = min(len(reader), MOST_DOCUMENTS)
    found = np.zeros((3, count), dtype=np.uint64)
    for number in range(count):
        document = reader[number]
        answer = last_answer(document)
        found[0, number] = _hash(document.ids)
        roles = document.run_roles.tolist()
        if USER in roles or SYSTEM in roles:
            found[1, number] = _hash(document.ids[: answer.start])
        found[2, number] = _hash(document.ids[answer])
        if step is not None and number % 1024 == 0:
            step(number, count)
    return Digests(found[0], found[1], found[2], reader.rows_of(slice(count)))


def groups(keys: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Groups of documents with equal keys from different rows, largest first. Key 0 means none."""
    numbers = np.flatnonzero(keys)
    numbers = numbers[np.lexsort((numbers, rows[numbers], keys[numbers]))]
    key, row = keys[numbers], rows[numbers]
    is_copy = np.zeros(len(numbers), dtype=bool)
    is_copy[1:] = (key[1:] == key[:-1]) & (row[1:] == row[:-1])
    numbers, key = numbers[~is_copy], key[~is_copy]
    cuts = np.flatnonzero(key[1:] != key[:-1]) + 1
    found = [np.sort(group) for group in np.split(numbers, cuts) if len(group) > 1]
    return sorted(found, key=lambda group: (-len(group), int(group[0])))


def _hash(ids: np.ndarray) -> int:
    return int.from_bytes(blake2b(ids.tobytes(), digest_size=8).digest(), "little") or 1
