"""Multiple choice: the choices of a data set, and the choice that an answer names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenize_data.examples import Example

_WORDS = ("yes", "no", "maybe")
_LETTERS = tuple("ABCDEFGHIJ")
_FEWEST_ROWS = 5


def choices_of(references: Sequence[Sequence[str]]) -> tuple[str, ...] | None:
    """The choices of a data set whose answers are all yes, no (and maybe), or letters. None for texts."""
    if len(references) < _FEWEST_ROWS:
        return None
    firsts = [row[0].strip() for row in references]
    words = {_bare(text).lower() for text in firsts}
    if words <= set(_WORDS) and len(words) > 1:
        return _WORDS if "maybe" in words else _WORDS[:2]
    letters = {named for text in firsts if (named := leading_letter(text)) is not None}
    if all(leading_letter(text) is not None for text in firsts) and len(letters) > 1:
        return _LETTERS[: _LETTERS.index(max(letters)) + 1]
    return None


def leading_letter(text: str) -> str | None:
    """The letter B in `B`, `(B)`, `B. text` and `B) text`."""
    found = re.match(r"\s*\(?([A-J])(?:\)|\.|:|\s*$)", text)
    return found.group(1) if found else None


def named_choice(answer: str, choices: Sequence[str]) -> str | None:
    """The choice that an answer names: at its start, after `answer is`, or as the only one in it. None if ambiguous."""
    if choices and choices[0] in _LETTERS:
        return _named_letter(answer, choices)
    text = answer.lower()
    pattern = "|".join(map(re.escape, sorted((choice.lower() for choice in choices), key=len, reverse=True)))
    start = re.match(rf"\W*({pattern})\b", text)
    stated = start or re.search(rf"\banswer\W+(?:is\W+)?({pattern})\b", text)
    if stated:
        return stated.group(1)
    found = set(re.findall(rf"\b({pattern})\b", text))
    return found.pop() if len(found) == 1 else None


def _named_letter(answer: str, choices: Sequence[str]) -> str | None:
    pattern = "".join(choices)
    start = leading_letter(answer)
    if start in choices:
        return start
    stated = re.search(rf"\b(?:answer|option|choice)\b\W*(?:is\W*)?\(?([{pattern}])\b", answer, re.IGNORECASE)
    if stated and stated.group(1).isupper():
        return stated.group(1)
    found = set(re.findall(rf"(?<![\w'])\(?([{pattern}])(?:\)|\.|:|,|$)", answer))  # `A patient` is not choice A
    return found.pop() if len(found) == 1 else None


def candidates(example: Example, choices: Sequence[str]) -> list[str] | None:
    """The texts whose likelihoods are compared, in the order of the choices; None if the row does not have them. They
    are the choices themselves, or for answers such as `B. text` the question's lines that start with a choice.
    """
    reference = example.references[0].strip()
    if choices[0] not in _LETTERS:
        written = _bare(reference)
        style = str.upper if written.isupper() else str.capitalize if written[:1].isupper() else str.lower
        return [reference.replace(written, style(choice), 1) if written else choice for choice in choices]
    if len(reference.strip("(). ")) == 1:
        letter = leading_letter(reference)
        return [reference.replace(letter, choice, 1) for choice in choices] if letter else None
    lines = {leading_letter(line): line.strip() for line in example.question.splitlines() if leading_letter(line)}
    found = [lines[choice] for choice in choices if choice in lines]
    return found if len(found) > 1 and reference in found else None


def _bare(text: str) -> str:
    return text.strip().strip(".!,;:()'\"* ")
