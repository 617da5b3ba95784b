"""Near duplicates: questions that share most word triples. MinHash proposes pairs; comparing the triples confirms
them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from tokenize_data.checks.finding import Example, Finding, first_few, of_all
from tokenize_data.checks.texts import Text, normal

ALIKE = 0.8  # share of all word triples of both
_WORDS = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+")  # without spaces: letters
_WIDTH, _FEWEST_WORDS = 3, 6
_NUM_HASHES, _NUM_BANDS = 128, 32
_COMMON, _LEAST_COMMON = 0.2, 20  # triples in more than a fifth of the documents belong to the prompt
_MOST_PAIRS = 50  # candidates per document


def is_available() -> bool:
    return find_spec("rensa") is not None


def within(texts: Sequence[Text]) -> list[Finding]:
    """Documents that are similar, but not equal, to an earlier one."""
    sets = _shingles(texts)
    pairs = [
        (one, two)
        for one, two in _pairs(sets, sets)
        if one < two and texts[one].row != texts[two].row and normal(texts[one].main) != normal(texts[two].main)
    ]
    like: dict[int, int] = {}
    for one, two in sorted(pairs):
        like.setdefault(two, one)
    if not like:
        return []
    examples = [Example(texts[two].place, texts[two].document, (texts[one].place,)) for two, one in like.items()]
    noun = "documents" if any(text.question for text in texts) else "texts"
    text = (
        f"{of_all(len(like), len(texts), noun)} are nearly the same as an earlier one ({ALIKE:.0%} of their words in "
        "order): look at a few, and keep one of each kind"
    )
    return [Finding("near duplicates", text, first_few(examples))]


def equal(texts: Sequence[Text], others: Sequence[Text], name: str) -> list[Finding]:
    """Rows of another file that are also training rows."""
    same = _equal(texts, others)
    if not same:
        return []
    examples = [Example(others[at].place, None, (text.place,)) for at, text in same.items()]
    text = (
        f"{of_all(len(same), len(others), f'rows of {name}')} are trained, word for word: scores on them show what the "
        "model remembers; remove them from the training data"
    )
    return [Finding(f"trained rows in {name}", text, first_few(examples))]


def alike(texts: Sequence[Text], others: Sequence[Text], name: str) -> list[Finding]:
    """Rows of another file that are similar, but not equal, to training rows."""
    if not is_available():
        return []
    taken = _equal(texts, others)
    sets = _shingles([*texts, *others])
    like: dict[int, int] = {}
    for two, one in sorted(_pairs(sets[len(texts) :], sets[: len(texts)])):
        if two not in taken:
            like.setdefault(two, one)
    if not like:
        return []
    examples = [Example(others[two].place, None, (texts[one].place,)) for two, one in like.items()]
    text = (
        f"{of_all(len(like), len(others), f'rows of {name}')} are nearly the same as a trained one ({ALIKE:.0%} "
        "of their words in order): check them"
    )
    return [Finding(f"rows like trained ones in {name}", text, first_few(examples))]


def _equal(texts: Sequence[Text], others: Sequence[Text]) -> dict[int, Text]:
    known = {normal(text.main): text for text in reversed(texts)}
    return {at: known[key] for at, other in enumerate(others) if (key := normal(other.main)) in known}


def _shingles(texts: Sequence[Text]) -> list[frozenset[str]]:
    """The word triples of each text, without common ones; empty for short texts."""
    every = []
    for text in texts:
        words = _WORDS.findall(normal(text.main))
        triples = zip(*(words[at:] for at in range(_WIDTH)), strict=False)
        every.append(frozenset(map(" ".join, triples)) if len(words) >= _FEWEST_WORDS else frozenset())
    looked_at = every[:: max(len(every) // 2000, 1)]
    counts = Counter(triple for triples in looked_at for triple in triples)
    least = max(_LEAST_COMMON, _COMMON * len(looked_at))
    common = frozenset(triple for triple, count in counts.items() if count > least)
    return [triples - common for triples in every] if common else every


def _pairs(asking: Sequence[frozenset[str]], known: Sequence[frozenset[str]]) -> list[tuple[int, int]]:
    """Pairs (index in `asking`, index in `known`) of similar texts."""
    import rensa

    index = rensa.RMinHashLSH(threshold=ALIKE, num_perm=_NUM_HASHES, num_bands=_NUM_BANDS)
    index.insert_many(_hashes(rensa, known))
    found = []
    for one, candidates in enumerate(index.query_all(_hashes(rensa, asking))):
        if not asking[one]:
            continue
        for two in sorted(candidates)[:_MOST_PAIRS]:
            shared = len(asking[one] & known[two])
            if shared and shared >= ALIKE * (len(asking[one]) + len(known[two]) - shared):
                found.append((one, two))
    return found


def _hashes(rensa: Any, sets: Sequence[frozenset[str]]) -> Any:
    """Hash triples; a text without triples gets a unique one, so that it matches no other."""
    lists = [sorted(triples) or [f"\0{number}"] for number, triples in enumerate(sets)]
    return rensa.RMinHash.from_token_sets(lists, _NUM_HASHES, 1)
