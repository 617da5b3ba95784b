"""A data set in memory with the reader's interface: random documents of different lengths, for comparing layouts."""

from __future__ import annotations

import numpy as np

from tokenize_data.reader import Document
from tokenize_data.rendered import ASSISTANT, SYSTEM, TEMPLATE, USER


class SyntheticReader:
    """The part of ShardReader's interface that training needs."""

    def __init__(self, num_documents: int, vocabulary_size: int, longest: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.documents = [
            _document(rng, vocabulary_size, int(rng.integers(5, longest + 1))) for _ in range(num_documents)
        ]
        self.lengths = np.array([len(document.ids) for document in self.documents], np.uint32)
        self.trained = np.array([document.trained().sum() for document in self.documents], np.uint32)

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, number: int) -> Document:
        return self.documents[number]

    def place(self, number: int) -> tuple[str, int]:
        return "synthetic", number


def _document(rng: np.random.Generator, vocabulary_size: int, length: int) -> Document:
    """Roles of a document: template, system message, question, answer, template."""
    cuts = np.sort(rng.choice(np.arange(1, length), size=4, replace=False))
    lengths = np.diff(np.concatenate([[0], cuts, [length]])).astype(np.uint16)
    roles = np.array([TEMPLATE, SYSTEM, USER, ASSISTANT, TEMPLATE], np.uint8)
    return Document(rng.integers(3, vocabulary_size, length).astype(np.uint16), lengths, roles)
