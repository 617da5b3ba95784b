"""Scores of a data set with bootstrap intervals, and differences between two models on the same rows.

A measure is a row of numbers for each answer, NK, and a function from their sum, K, to the score. So a resample of the
rows is a weighted sum, for means, perplexity, BLEU and chrF alike, and two models are resampled alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sft.evaluate import text_metrics
from sft.evaluate.choices import choices_of, named_choice

NUM_SAMPLES = 1000
_SEED, _MOST_WEIGHTS = 1234, 20_000_000
LOWER_IS_BETTER = ("perplexity",)
PERCENT = (
    "exact_match",
    "f1",
    "rouge1",
    "rouge2",
    "rougeL",
    "rougeLsum",
    "accuracy",
    "accuracy_likelihood",
    "stopped",
    "judge",
    "judge_wins",
)
NAMES = {
    "perplexity": "perplexity",
    "exact_match": "exact match",
    "f1": "token F1",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "bleu": "BLEU",
    "chrf": "chrF",
    "accuracy": "accuracy",
    "accuracy_likelihood": "accuracy by likelihood",
    "stopped": "ended by itself",
    "judge": "judge",
    "judge_wins": "judge: preferred",
}


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A score of one data set. `rows` are the indices of the examples that it covers."""

    name: str
    counts: np.ndarray  # NK
    finish: Callable[[np.ndarray], float]
    rows: np.ndarray

    @property
    def score(self) -> float:
        return self.finish(self.counts.sum(0))


@dataclass(frozen=True, kw_only=True)
class Score:
    """A score as in scores.json."""

    value: float
    low: float  # bounds of the 95 % interval
    high: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Another model's score minus the base's, on common rows. `p` comes from a two-sided paired bootstrap."""

    value: float
    low: float
    high: float
    p: float
    count: int


def measures(predictions: Sequence[Mapping[str, Any]], processes: int = 1) -> list[Measure]:
    """All scores of one model's predictions on one data set. Adds each row's own scores to it, as `scores`."""
    found = []
    likely = [
        (place, row["nll"], row["answer_tokens"]) for place, row in enumerate(predictions) if row.get("nll") is not None
    ]
    if likely:
        counts = np.array([[nll, tokens] for _, nll, tokens in likely], dtype=np.float64)
        found.append(
            Measure(
                name="perplexity", counts=counts, finish=_perplexity, rows=np.array([place for place, *_ in likely])
            )
        )
    answered = [place for place, row in enumerate(predictions) if row.get("answer") is not None and row["references"]]
    if answered:
        found += _of_answers(predictions, answered, processes)
    for key in ("accuracy", "accuracy_likelihood", "judge", "judge_wins"):
        rated = [place for place, row in enumerate(predictions) if row["scores"].get(key) is not None]
        if rated:
            found.append(_mean(key, [predictions[place]["scores"][key] for place in rated], rated))
    return found


def _of_answers(predictions: Sequence[Mapping[str, Any]], answered: Sequence[int], processes: int) -> list[Measure]:
    pairs: list[text_metrics.Pair] = [
        (predictions[place]["answer"], predictions[place]["references"]) for place in answered
    ]
    choices = choices_of([references for _, references in pairs])
    values = {
        "exact_match": [text_metrics.exact_match(*pair) for pair in pairs],
        "f1": [text_metrics.token_f1(*pair) for pair in pairs],
        **text_metrics.rouge(pairs, processes),
        "stopped": [float(predictions[place]["finish"] == "stop") for place in answered],
    }
    if choices is not None:
        named = [(named_choice(answer, choices), named_choice(references[0], choices)) for answer, references in pairs]
        for place, (choice, right) in zip(answered, named, strict=True):
            predictions[place]["scores"]["accuracy"] = float(choice == right)
            predictions[place]["scores"]["choice"] = choice
    for name, row_values in values.items():
        for place, value in zip(answered, row_values, strict=True):
            predictions[place]["scores"][name] = value
    found = [_mean(name, row_values, answered) for name, row_values in values.items()]
    for metric in ("bleu", "chrf"):
        counts, finish = text_metrics.corpus_sums(metric, pairs)
        found.append(Measure(name=metric, counts=counts, finish=finish, rows=np.array(answered)))
    return found


def score_of(measure: Measure) -> Score:
    low, high = np.percentile(_resampled([measure])[0], [2.5, 97.5])
    return Score(value=measure.score, low=float(low), high=float(high), count=len(measure.rows))


def difference_of(measure: Measure, base: Measure) -> Difference | None:
    """The difference; None without common rows."""
    _, here, there = np.intersect1d(measure.rows, base.rows, return_indices=True)
    if not len(here):
        return None
    pair = [
        Measure(name=side.name, counts=side.counts[places], finish=side.finish, rows=side.rows[places])
        for side, places in ((measure, here), (base, there))
    ]
    ours, theirs = _resampled(pair)
    differences = ours - theirs
    low, high = np.percentile(differences, [2.5, 97.5])
    tail = min((differences <= 0).mean(), (differences >= 0).mean())
    p = min(1.0, 2 * max(float(tail), 1 / len(differences)))
    return Difference(value=pair[0].score - pair[1].score, low=float(low), high=float(high), p=p, count=len(here))


def joined(parts: Sequence[Measure]) -> Measure:
    """A measure over several data sets, with equal weight per row."""
    offsets = np.cumsum([0, *(int(part.rows.max()) + 1 for part in parts)])
    rows = np.concatenate([part.rows + offset for part, offset in zip(parts, offsets[:-1], strict=True)])
    return Measure(
        name=parts[0].name, counts=np.concatenate([part.counts for part in parts]), finish=parts[0].finish, rows=rows
    )


def _mean(name: str, values: Sequence[float], rows: Sequence[int]) -> Measure:
    counts = np.stack([np.array(values, dtype=np.float64), np.ones(len(values))], 1)
    return Measure(name=name, counts=counts, finish=_ratio, rows=np.array(rows))


def _ratio(sums: np.ndarray) -> float:
    return float(sums[0] / sums[1])


def _perplexity(sums: np.ndarray) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(sums[0] / sums[1])) if sums[1] else float("nan")


def _resampled(sides: Sequence[Measure]) -> list[np.ndarray]:
    """Both scores on the same bootstrap samples of the rows."""
    number = len(sides[0].rows)
    rng = np.random.default_rng(_SEED)
    scores: list[list[float]] = [[] for _ in sides]
    at_once = max(1, min(NUM_SAMPLES, _MOST_WEIGHTS // number))
    for start in range(0, NUM_SAMPLES, at_once):
        size = min(at_once, NUM_SAMPLES - start)
        drawn = rng.integers(0, number, (size, number)) + np.arange(size)[:, None] * number
        weights = np.bincount(drawn.ravel(), minlength=size * number).reshape(size, number).astype(np.float64)
        for side, values in zip(sides, scores, strict=True):
            values += [side.finish(sums) for sums in weights @ side.counts]
    return [np.array(values) for values in scores]
