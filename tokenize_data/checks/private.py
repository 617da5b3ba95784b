"""Finds private data by patterns. It is counted and hidden, never shown."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from tokenize_data.checks.finding import Example, Finding, first_few, of_all
from tokenize_data.checks.texts import Text

HIDDEN = "[hidden]"
_PATTERNS = {
    "e-mail addresses": re.compile(r"[\w.+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}"),
    "keys": re.compile(
        r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|A[KS]IA[A-Z0-9]{16}"
        r"|xox[abprs]-[\w-]{10,}|glpat-[\w-]{20,}|AIza[\w-]{35}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})"
        r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    ),
    "social security numbers": re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])"),
}


def private(texts: Sequence[Text]) -> list[Finding]:
    found: dict[str, list[Text]] = defaultdict(list)
    for text in texts:
        for name, pattern in _PATTERNS.items():
            if pattern.search(text.question) or pattern.search(text.answer):
                found[name].append(text)
    return [
        Finding(
            name,
            f"{of_all(len(some), len(texts))} contain what looks like {name}: a model can repeat them; replace or "
            "remove them",
            first_few([Example(text.place, text.document) for text in some]),
        )
        for name, some in found.items()
    ]


def hidden(text: str) -> str:
    """Hide what looks private in a text."""
    for pattern in _PATTERNS.values():
        text = pattern.sub(HIDDEN, text)
    return text
