"""Exact duplicates, contradicting answers, and validation questions that are also trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tokenize_data.checks.digests import Digests, groups
from tokenize_data.checks.finding import Example, Finding, first_few, of_all
from tokenize_data.reader import ShardReader

_MOST_OTHERS = 3


def exact(reader: ShardReader, digests: Digests) -> list[Finding]:
    found = groups(digests.whole, digests.rows)
    count = sum(len(group) - 1 for group in found)
    if not count:
        return []
    text = (
        f"{of_all(count, len(digests))} repeat an earlier one exactly: remove them, unless they should count more than "
        "others"
    )
    return [Finding("exact duplicates", text, _examples(reader, found), share=count / len(digests))]


def conflicts(reader: ShardReader, digests: Digests) -> list[Finding]:
    """Equal questions with different answers."""
    found = [group for group in groups(digests.question, digests.rows) if len(np.unique(digests.answer[group])) > 1]
    if not found:
        return []
    text = (
        f"{of_all(sum(map(len, found)), len(digests))} ask what others ask, and answer it differently "
        f"({len(found):,} such question{'s' if len(found) > 1 else ''}): the model cannot learn both; check which "
        "answer is right"
    )
    return [Finding("contradicting answers", text, _examples(reader, found))]


def leaks(training: Digests, validation: Digests, readers: tuple[ShardReader, ShardReader]) -> list[Finding]:
    """Validation questions that are also trained."""
    has_question = bool(training.question.any() and validation.question.any())
    known = training.question if has_question else training.whole
    asked = validation.question if has_question else validation.whole
    shared = np.flatnonzero((asked != 0) & np.isin(asked, known))
    if not len(shared):
        return []
    order = np.argsort(known, kind="stable")
    at = order[np.searchsorted(known, asked[shared], sorter=order)]
    examples = [
        Example(readers[1].place_text(int(number)), None, (readers[0].place_text(int(same)),))
        for number, same in zip(shared[:20], at[:20], strict=True)
    ]
    what = "ask what is also trained" if has_question else "are also trained"
    text = (
        f"{of_all(len(shared), len(validation), 'validation documents')} {what}, word for word: their loss does not "
        "show how the model does on new questions; remove them from one side, or split with --val_group"
    )
    return [Finding("trained and validated", text, tuple(examples))]


def _examples(reader: ShardReader, found: Sequence[np.ndarray]) -> tuple[Example, ...]:
    return first_few(
        [
            Example(
                reader.place_text(int(group[0])),
                int(group[0]),
                tuple(reader.place_text(int(number)) for number in group[1 : 1 + _MOST_OTHERS]),
                f"{len(group):,} times" if len(group) > 1 + _MOST_OTHERS else "",
            )
            for group in found[:20]
        ]
    )
