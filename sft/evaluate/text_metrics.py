"""Scores of one answer against its references: exact match and F1 after SQuAD's normalisation, ROUGE. BLEU and chrF as
sums to add up.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np

from tokenize_data.errors import UserError

ROUGES = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rougeL", "rougeLsum": "rougeLsum"}
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)
_FEW = 20_000  # fewer take less than ten seconds, so starting processes hardly pays
_MISSING = "scores need rouge-score and sacrebleu: pip install 'megasft[evaluate]'"

Pair = tuple[str, Sequence[str]]  # an answer and its references


def normalised(text: str) -> str:
    """Normalise as SQuAD does: lower case, no punctuation or articles, single spaces."""
    text = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    found = normalised(answer)
    return float(any(found == normalised(reference) for reference in references))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """The best token F1 over the references; equality if one side has no words."""
    return max(_f1(normalised(answer).split(), normalised(reference).split()) for reference in references)


def _f1(found: list[str], expected: list[str]) -> float:
    if not found or not expected:
        return float(found == expected)
    common = sum((Counter(found) & Counter(expected)).values())
    precision, recall = common / len(found), common / len(expected)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def rouge(pairs: Sequence[Pair], processes: int = 1) -> dict[str, list[float]]:
    """ROUGE F-measures by rouge-score, without stemming; the best of several references, as in its score_multi."""
    try:
        import rouge_score.rouge_scorer  # noqa: F401 - whether it is there
    except ImportError as error:
        raise UserError(_MISSING) from error
    if processes > 1 and len(pairs) > _FEW:
        parts = [pairs[start : start + 500] for start in range(0, len(pairs), 500)]
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            rows = [row for part in pool.map(_rouge_rows, parts) for row in part]
    else:
        rows = _rouge_rows(pairs)
    return {name: [row[index] for row in rows] for index, name in enumerate(ROUGES)}


def _rouge_rows(pairs: Sequence[Pair]) -> list[tuple[float, ...]]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGES), use_stemmer=False)
    found = [scorer.score_multi(list(references), answer) for answer, references in pairs]
    return [tuple(float(scores[name].fmeasure) for name in ROUGES) for scores in found]


def corpus_sums(metric: str, pairs: Sequence[Pair]) -> tuple[np.ndarray, Callable[[np.ndarray], float]]:
    """sacrebleu's counts per answer, NK, and the function from their sum, K, to the corpus score, so that bootstrap
    samples are cheap.
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise UserError(_MISSING) from error
    scorer: Any = BLEU() if metric == "bleu" else CHRF()
    most = max(len(references) for _, references in pairs)
    streams = [
        [references[index] if index < len(references) else None for _, references in pairs] for index in range(most)
    ]
    # Both methods are what sacrebleu's own bootstrap is made of; tests/unit/test_scores.py compares with corpus_score.
    counts = np.array(scorer._extract_corpus_statistics([answer for answer, _ in pairs], streams), dtype=np.float64)
    return counts, lambda sums: float(scorer._compute_score_from_stats([int(value) for value in sums.round()]).score)
