"""Checks answers: empty, most frequent, unfinished, or copied from the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from tokenize_data.checks.digests import Digests
from tokenize_data.checks.finding import Example, Finding, first_few, of_all
from tokenize_data.checks.texts import Text, normal, texts_of
from tokenize_data.reader import ShardReader

NUM_FREQUENT, _LEAST_SHARE = 5, 0.01
_MANY, _FEW_ANSWERS = 0.5, 50  # half of all; fewer documents prove nothing
_FEW_TOKENS = 3  # an empty answer has only its end of turn and perhaps spaces
_LONG_WORDS, _USUALLY = 20, 0.8
_ENDS = tuple(".!?…。！？।؟:;)]}\"'”’»`*>|")
_OWN_WORDS, _SELDOM = 5, 0.5


@dataclass(frozen=True)
class Frequent:
    """One of the most frequent answers. `share` is also what always giving it would score (exact match)."""

    text: str
    share: float
    validation_share: float | None = None


def frequent(
    reader: ShardReader, backend: Tokenizer, digests: Digests, validation: Digests | None = None
) -> list[Frequent]:
    values, first, counts = np.unique(digests.answer, return_index=True, return_counts=True)
    least = max(2, _LEAST_SHARE * len(digests))
    order = [number for number in np.argsort(-counts, kind="stable")[:NUM_FREQUENT] if counts[number] >= least]
    texts = texts_of(reader, backend, first[order]) if order else []
    return [
        Frequent(
            text.answer,
            float(counts[number] / len(digests)),
            float(np.mean(validation.answer == values[number])) if validation is not None and len(validation) else None,
        )
        for number, text in zip(order, texts, strict=True)
    ]


def lopsided(answers: Sequence[Frequent], num_documents: int) -> list[Finding]:
    if not answers or answers[0].share < _MANY or num_documents < _FEW_ANSWERS:
        return []
    top, shown = answers[0], _shown(answers[0].text)
    if top.share == 1.0:
        return [Finding("constant answer", f"every answer is {shown}: there is nothing to learn; check the answer key")]
    of_validation = f", {top.validation_share:.1%} of the validation set" if top.validation_share is not None else ""
    text = (
        f"{top.share:.1%} of the answers are {shown}: always giving it scores {top.share:.1%} (exact match)"
        f"{of_validation}; compare every score with that"
    )
    return [Finding("one answer dominates", text)]


def empty(reader: ShardReader, backend: Tokenizer, num_documents: int) -> list[Finding]:
    short = np.flatnonzero(reader.trained[:num_documents] <= _FEW_TOKENS)
    texts = [text for text in texts_of(reader, backend, short) if not text.answer]
    if not texts:
        return []
    text = f"{of_all(len(texts), num_documents)} have an empty answer: the model learns to say nothing; remove them"
    return [Finding("empty answers", text, _places(texts))]


def cut_off(reader: ShardReader, num_documents: int) -> list[Finding]:
    """Documents that --seq cut."""
    cut = np.flatnonzero(reader.cut_at_right[:num_documents])
    if not len(cut):
        return []
    examples = [
        Example(reader.place_text(int(number)), int(number), note=f"{int(reader.cut_at_right[number]):,} tokens")
        for number in cut[:20]
    ]
    text = (
        f"{of_all(len(cut), num_documents)} are cut at --seq {reader.manifest.seq:,}, so the end of the answer is "
        "missing: raise --seq"
    )
    return [Finding("cut documents", text, tuple(examples))]


def unfinished(texts: Sequence[Text]) -> list[Finding]:
    """Long answers without a final full stop, if nearly all others have one."""
    long = [text for text in texts if not text.is_cut and len(text.answer.split()) >= _LONG_WORDS]
    open_ = [text for text in long if not text.answer.endswith(_ENDS)]
    if not open_ or len(open_) > (1 - _USUALLY) * len(long):
        return []
    text = (
        f"{of_all(len(open_), len(long), 'long answers')} end without a full stop where the others have one: they may "
        "have been cut off before; compare them with their source"
    )
    return [Finding("unfinished answers", text, _places(open_))]


def within_question(texts: Sequence[Text]) -> list[Finding]:
    """Long answers that are in the question. If most are, as in extraction and multiple choice, this is only a note."""
    asked = [text for text in texts if text.question and text.answer]
    copied = [text for text in asked if normal(text.answer) in normal(text.question)]
    if not copied:
        return []
    share = len(copied) / len(asked)
    if share >= _SELDOM:
        text = (
            f"{of_all(len(copied), len(asked), 'answers')} appear verbatim in their question, as in multiple choice "
            "and extraction: the task is to copy the right part"
        )
        return [Finding("answers within the question", text, is_warning=False)]
    long = [text for text in copied if len(text.answer.split()) >= _OWN_WORDS]
    if not long:
        return []
    text = (
        f"{of_all(len(long), len(asked), 'answers')} of {_OWN_WORDS} words or more appear verbatim in their question: "
        "the model only has to copy them; check that the question does not give them away"
    )
    return [Finding("answers within the question", text, _places(long))]


def _places(texts: Sequence[Text]) -> tuple[Example, ...]:
    return first_few([Example(text.place, text.document) for text in texts])


def _shown(text: str, most: int = 60) -> str:
    line = " ".join(text.split())
    return f'"{line}"' if len(line) <= most else f'"{line[: most - 1]}…"'
