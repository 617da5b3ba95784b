"""Scores equal the libraries' own, the training loss equals transformers', intervals and differences are those of
resampling.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from transformers import AutoModelForCausalLM

from sft.evaluate import scores, tables, text_metrics
from sft.evaluate.choices import candidates, choices_of, named_choice
from sft.evaluate.likelihood import answer_likelihoods, candidate_likelihoods
from tests import tiny
from tests.counting import lines_run
from tokenize_data.examples import Example
from tokenize_data.fields import Conversation
from tokenize_data.prompts import open_format
from tokenize_data.rendered import ASSISTANT

_TEXT = (
    "the patient was given an ACE inhibitor and blood pressure fell to 130/80 in six weeks. Is it so? Größe, naïve\n"
)
_WORDS = re.findall(r"\S+\s*", _TEXT)


def made_pairs(count: int, seed: int = 1, most_words: int = 30) -> list[text_metrics.Pair]:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(_WORDS, k=rng.randrange(0, most_words))) for _ in range(count * 3)]
    return [(texts[3 * n], [text or "x" for text in texts[3 * n + 1 : 3 * n + 2 + n % 2]]) for n in range(count)]


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("The ACE inhibitor.", ["an ace  inhibitor"], 1.0, 1.0),
        ("yes, it is", ["no", "Yes"], 0.0, 0.5),
        ("", ["the"], 1.0, 1.0),
        ("", ["yes"], 0.0, 0.0),
        ("a cat sat", ["cat sat down"], 0.0, 0.8),
        ("b b c", ["b c c"], 0.0, 2 / 3),
    ],
)
def test_exact_match_and_f1(answer: str, references: list[str], exact: float, f1: float) -> None:
    assert text_metrics.exact_match(answer, references) == exact
    assert text_metrics.token_f1(answer, references) == pytest.approx(f1)


def test_rouge_bleu_and_chrf_are_the_libraries_own() -> None:
    pairs = made_pairs(60)
    found = text_metrics.rouge(pairs)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"])
    for index, (answer, references) in enumerate(pairs):
        expected = scorer.score_multi(references, answer)
        assert {name: found[name][index] for name in found} == {name: expected[name].fmeasure for name in expected}
    streams = [[references[n] if n < len(references) else None for _, references in pairs] for n in (0, 1)]
    for metric, library in (("bleu", BLEU()), ("chrf", CHRF())):
        counts, finish = text_metrics.corpus_sums(metric, pairs)
        assert finish(counts.sum(0)) == library.corpus_score([answer for answer, _ in pairs], streams).score


def row(answer: str, references: list[str], **more: Any) -> dict[str, Any]:
    return {"answer": answer, "references": references, "finish": "stop", "scores": {}, **more}


def test_scoring_costs_as_much_for_each_further_prediction() -> None:
    """Counted in lines of Python. How long ten thousand take is in benchmarks/."""

    def work(count: int) -> int:
        rows = [row(answer, references) for answer, references in made_pairs(count, most_words=40)]
        return lines_run(lambda: [scores.score_of(measure) for measure in scores.measures(rows)])

    few, some, many = work(20), work(40), work(80)
    assert many - some < 3 * (some - few)


def test_intervals_cover_and_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    hits, covered = rng.random((200, 100)) < 0.3, 0
    for sample in hits[:40]:
        (measure,) = (
            m
            for m in scores.measures([row("yes" if hit else "no", ["yes"]) for hit in sample])
            if m.name == "exact_match"
        )
        score = scores.score_of(measure)
        covered += score.low <= 0.3 <= score.high
        assert score.value == sample.mean()
    assert covered >= 34
    base = [row("yes" if hit else "no", ["yes"]) for hit in hits[0]]
    better = [row("yes" if hit or n % 5 == 0 else "no", ["yes"]) for n, hit in enumerate(hits[0])]
    ours, theirs = ({m.name: m for m in scores.measures(rows)} for rows in (better, base))
    found = scores.difference_of(ours["exact_match"], theirs["exact_match"])
    assert found is not None
    assert found.value == pytest.approx(ours["exact_match"].score - theirs["exact_match"].score)
    assert 0 < found.low < found.value < found.high
    assert found.p <= 0.002
    same = scores.difference_of(theirs["bleu"], theirs["bleu"])
    assert same is not None
    assert (same.value, same.p) == (0.0, 1.0)


def test_perplexity_is_that_of_all_tokens_together() -> None:
    rows = [row("x", ["y"], nll=nll, answer_tokens=tokens) for nll, tokens in ((10.0, 2), (30.0, 30))]
    (measure,) = (m for m in scores.measures(rows) if m.name == "perplexity")
    assert measure.score == pytest.approx(math.exp(40 / 32))
    both = scores.joined([measure, measure])
    assert both.score == pytest.approx(math.exp(40 / 32))
    assert both.rows.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("references", "choices"),
    [
        (["yes", "no", "Yes.", "no", "maybe"], ("yes", "no", "maybe")),
        (["yes", "no", "yes", "no", "no"], ("yes", "no")),
        (["A", "(C)", "B.", "B) text", "A. x"], ("A", "B", "C")),
        (["A patient", "B", "C", "A", "A"], None),
        (["yes", "no"], None),
        (["yes", "yes", "yes", "yes", "yes"], None),
    ],
)
def test_choices_of_a_data_set(references: list[str], choices: tuple[str, ...] | None) -> None:
    assert choices_of([[reference] for reference in references]) == choices


@pytest.mark.parametrize(
    ("answer", "choices", "named"),
    [
        ("Yes, because ...", ("yes", "no", "maybe"), "yes"),
        ("**No**", ("yes", "no", "maybe"), "no"),
        ("The answer is: maybe.", ("yes", "no", "maybe"), "maybe"),
        ("It does not, so no", ("yes", "no", "maybe"), "no"),
        ("It could be yes or no", ("yes", "no", "maybe"), None),
        ("nobody knows", ("yes", "no", "maybe"), None),
        ("B. IL-4", ("A", "B", "C"), "B"),
        ("(C)", ("A", "B", "C"), "C"),
        ("The correct answer is C", ("A", "B", "C"), "C"),
        ("A patient with fever", ("A", "B", "C"), None),
        ("I would choose option (B), as A is wrong", ("A", "B", "C"), "B"),
        ("", ("A", "B"), None),
    ],
)
def test_the_choice_that_an_answer_names(answer: str, choices: tuple[str, ...], named: str | None) -> None:
    assert named_choice(answer, choices) == named


def test_candidates() -> None:
    def of(reference: str, question: str = "?", choices: tuple[str, ...] = ("A", "B")) -> list[str] | None:
        prompt = ({"role": "user", "content": question},)
        return candidates(Example(number=0, place="", row={}, prompt=prompt, references=(reference,)), choices)

    assert of("Yes.", choices=("yes", "no", "maybe")) == ["Yes.", "No.", "Maybe."]
    assert of("(B)") == ["(A)", "(B)"]
    assert of("B. IL-4", "Which?\nA. IL-2\nB. IL-4") == ["A. IL-2", "B. IL-4"]
    assert of("B. IL-4", "Which?") is None


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, family: Callable[[str], Path]) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("scores") / "model", family("smollm"))


def _conversations() -> list[list[dict[str, str]]]:
    pairs = [("Are you coming?", "Yes, at 8."), ("Summarise: " + "Anna and Ben. " * 6, "They meet."), ("x", "no")]
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for question, answer in pairs
    ]
    return [*chats, [*chats[0], *chats[2]]]


def test_perplexity_equals_transformers_on_the_same_ids(model_folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    chat = open_format(model_folder)
    documents = [
        document for messages in _conversations() for document in chat.documents(Conversation(messages=messages))
    ]
    found = dict(answer_likelihoods(model, documents))
    for number, document in enumerate(documents):
        roles = np.repeat(document.run_roles, document.run_lengths)
        ids = torch.tensor(document.ids.astype(np.int64))[None]
        labels = torch.where(torch.tensor(roles)[None] == ASSISTANT, ids, -100)
        with torch.no_grad():
            expected = model(ids, labels=labels).loss.item()
        likelihood = found[number]
        assert likelihood.tokens == document.trained == int((labels[:, 1:] != -100).sum())
        assert math.exp(likelihood.nll / likelihood.tokens) == pytest.approx(math.exp(expected), rel=1e-5)


def test_candidates_share_what_they_begin_with(model_folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    chat = open_format(model_folder)
    for earlier in ([], _conversations()[0]):
        prompt = [*earlier, {"role": "user", "content": "Is it so?"}]
        documents = [
            chat.documents(Conversation(messages=[*prompt, {"role": "assistant", "content": text}]))[-1]
            for text in ("yes", "no", "maybe, maybe not")
        ]
        whole = [likelihood for _, likelihood in sorted(answer_likelihoods(model, documents), key=lambda pair: pair[0])]
        before = (
            [
                likelihood
                for document in chat.documents(Conversation(messages=earlier))
                for _, likelihood in answer_likelihoods(model, [document])
            ]
            if earlier
            else []
        )
        common = sum(part.nll for part in before)
        found = candidate_likelihoods(model, documents)
        assert [part.nll + common for part in found] == pytest.approx([part.nll for part in whole], rel=1e-5)


def test_scores_json_holds_no_nan(tmp_path: Path) -> None:
    from sft.evaluate.lines import write_json

    write_json(tmp_path / "x.json", {"a": [float("nan"), 1.5], "b": float("inf")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.5], "b": None}


def test_the_table_of_two_models_fits_80_columns(capsys):
    from rich.console import Console

    score = {"value": 0.6, "low": 0.55, "high": 0.65, "count": 1000}
    names = ("exact_match", "perplexity")
    fitted = {
        "scores": dict.fromkeys(names, score),
        "differences": {name: {"value": 0.02, "p": 0.03} for name in names},
    }
    models = [
        {"label": "meditron-7b", "datasets": {"pubmedqa-test": {"scores": dict.fromkeys(names, score)}}},
        {"label": "llama-7-meditron-pubmedqa", "datasets": {"pubmedqa-test": fitted}},
    ]
    console = Console(width=80, soft_wrap=True)
    console.print(tables.terminal({"base": "meditron-7b", "models": models}), soft_wrap=False)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("0.03)") == 2
