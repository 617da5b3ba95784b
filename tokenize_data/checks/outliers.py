"""Outliers: very long or short documents, other languages."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import numpy as np

from tokenize_data.checks.finding import Example, Finding, first_few, of_all
from tokenize_data.checks.texts import Text
from tokenize_data.reader import ShardReader

_FAR, _LEAST_TIMES = 6.0, 8.0  # median deviations of the logarithm, and at least 8 times the median
_FEWEST = 50
_MOST_LANGUAGE, _FEWEST_LETTERS, _MOST_CHARACTERS = 5000, 60, 1000
_MAIN, _CERTAIN = 0.6, 0.9


def lengths(reader: ShardReader, num_documents: int) -> list[Finding]:
    if num_documents < _FEWEST:
        return []
    found = []
    for noun, values in (("documents", reader.lengths), ("answers", reader.trained)):
        values = values[:num_documents]
        logs = np.log(np.maximum(values, 1))
        middle = float(np.median(logs))
        spread = 1.4826 * float(np.median(np.abs(logs - middle)))
        far = np.flatnonzero(np.abs(logs - middle) > max(_FAR * spread, np.log(_LEAST_TIMES)))
        if not len(far) or len(far) > 0.02 * num_documents:
            continue  # more are a second kind of documents, which the histogram shows
        order = far[np.argsort(-np.abs(logs[far] - middle), kind="stable")]
        examples = [
            Example(reader.place_text(int(at)), int(at), note=f"{int(values[at]):,} tokens") for at in order[:20]
        ]
        text = (
            f"{of_all(len(far), num_documents, noun)} are far longer or shorter than the others "
            f"(median {int(np.median(values)):,} tokens): look at them"
        )
        found.append(Finding(f"{noun} of unusual length", text, tuple(examples), is_warning=False))
    return found


def languages(texts: Sequence[Text], name_of: Callable[[str], str] | None = None) -> list[Finding]:
    """Documents in another language than most. Short ones are skipped."""
    name_of = name_of or classifier() or script
    some = texts[:: max(len(texts) // _MOST_LANGUAGE, 1)]
    long = [(text, joined) for text in some if _letters(joined := f"{text.question} {text.answer}") >= _FEWEST_LETTERS]
    named = [(text, name_of(joined[:_MOST_CHARACTERS])) for text, joined in long]
    counts = Counter(name for _, name in named if name)
    if not counts:
        return []
    main, most = counts.most_common(1)[0]
    others = [(text, name) for text, name in named if name and name != main]
    if not others or most < _MAIN * len(named):
        return _mixed(counts, len(named)) if others else []
    examples = [Example(text.place, text.document, note=name) for text, name in others]
    text = (
        f"{of_all(len(others), len(named))} are in another language than the others ({main}): leave them out, unless "
        "the model should answer in these languages"
    )
    return [Finding("other languages", text, first_few(examples), is_warning=len(others) < 0.1 * len(named))]


def knows_languages() -> bool:
    return find_spec("py3langid") is not None


def classifier() -> Callable[[str], str] | None:
    """A function from a text to its language, empty if uncertain; None without py3langid."""
    if not knows_languages():
        return None
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def name_of(text: str) -> str:
        name, probability = identifier.classify(text)
        return str(name) if probability >= _CERTAIN else ""

    return name_of


def script(text: str) -> str:
    """The script of most letters: Latin, Cyrillic, CJK."""
    counts = Counter(unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha())
    name = counts.most_common(1)[0][0] if counts else ""
    return name if name == "CJK" else name.capitalize()


def _mixed(counts: Counter[str], total: int) -> list[Finding]:
    shares = ", ".join(f"{name} {count / total:.0%}" for name, count in counts.most_common(5))
    return [Finding("languages", f"several languages: {shares}", is_warning=False)]


def _letters(text: str) -> int:
    return sum(letter.isalpha() for letter in text[: 4 * _FEWEST_LETTERS])
