"""A finding: a sentence, and examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NUM_EXAMPLES = 20


@dataclass(frozen=True)
class Example:
    """An example document. `others` are the ones that it repeats."""

    place: str
    document: int | None = None  # its number in the data set
    others: tuple[str, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        others = f" = {', '.join(self.others)}" if self.others else ""
        return f"{self.place}{others}{f' ({self.note})' if self.note else ''}"


@dataclass(frozen=True)
class Finding:
    name: str
    text: str
    examples: tuple[Example, ...] = ()
    is_warning: bool = True
    share: float = 1.0  # of the documents

    def line(self, most: int = 3) -> str:
        """The sentence with the first few examples."""
        if not self.examples:
            return self.text
        shown = "; ".join(str(example) for example in self.examples[:most])
        more = "; ..." if len(self.examples) > most else ""
        return f"{self.text} [{shown}{more}]"


def of_all(count: int, total: int, noun: str = "documents") -> str:
    """12 of 400 documents (3.0%)."""
    return f"{count:,} of {total:,} {noun} ({count / max(total, 1):.1%})"


def first_few(examples: Sequence[Example]) -> tuple[Example, ...]:
    return tuple(examples[:NUM_EXAMPLES])
