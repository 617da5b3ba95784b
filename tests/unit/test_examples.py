"""Rows to questions and expected answers: the same texts as in training, answers that may be missing or several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft.evaluate.questions import specs_for, system_message
from tests.conftest import Workbench
from tokenize_data.dataset import Cleaning, DatasetSpec
from tokenize_data.errors import UserError
from tokenize_data.examples import Example, read_examples


def read(tmp_path: Path, *rows: Any, answers_needed: bool = False, **spec: Any) -> list[Example]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(DatasetSpec(files=(str(path),), **spec), answers_needed=answers_needed).rows


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("row", "spec", "prompt", "references"),
    [
        ({"prompt": "q", "gold": "a"}, {}, [USER], ("a",)),
        ({"prompt": "q", "gold": ["a", "b"]}, {}, [USER], ("a", "b")),
        ({"prompt": "q"}, {}, [USER], ()),
        ({"prompt": "q", "gold": None}, {}, [USER], ()),
        (
            {"x": "q", "y": "A!", "s": "Brief."},
            {"question_key": "x", "answer_key": "y", "system_key": "s", "clean": Cleaning(drop="!", lower=True)},
            [{"role": "system", "content": "brief."}, USER],
            ("a",),
        ),
        (
            {"n": "q", "letter": "B", "text": "IL-4"},
            {"prompt": "{n}", "answer": "{letter}. {text}"},
            [USER],
            ("B. IL-4",),
        ),
        ({"instruction": "q", "input": "", "output": "a"}, {}, [USER], ("a",)),
        ({"messages": [USER, {"role": "assistant", "content": "a"}]}, {}, [USER], ("a",)),
        ({"messages": [USER]}, {}, [USER], ()),
        (
            {"messages": [USER, {"role": "assistant", "content": "a"}, USER, {"role": "assistant", "content": "c"}]},
            {},
            [USER, {"role": "assistant", "content": "a"}, USER],
            ("c",),
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {}, [USER], ("a",)),
        ({"conversations": [{"from": "human", "value": "q"}]}, {}, [USER], ()),
    ],
)
def test_rows(
    row: dict[str, Any], spec: dict[str, Any], prompt: list[Any], references: tuple[str, ...], tmp_path: Path
) -> None:
    (example,) = read(tmp_path, row, **spec)
    assert (list(example.prompt), example.references, example.row) == (prompt, references, row)
    assert example.place.endswith("rows.jsonl line 1")


def test_text_rows_and_limits(tmp_path: Path) -> None:
    (example, _) = read(tmp_path, {"text": "one"}, {"text": "two"})
    assert (example.text, example.prompt, example.question) == ("one", (), "one")
    path = tmp_path / "rows.jsonl"
    rows = read_examples(DatasetSpec(files=(str(path),), weight=0.5), answers_needed=True, limit=1).rows
    assert [row.text for row in rows] == ["one"], "a weight is for training"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "gold": 3}, "line 1: 'gold' is a number (3), not text"),
        ({"prompt": "q", "gold": ["a", 3]}, "line 1: 'gold' is a number (3), not text"),
        ({"prompt": "q", "gold": []}, "line 1: no answer to compare with: 'gold' is an empty list"),
        ({"messages": [USER]}, "line 1: no answer to compare with"),
        ({"promt": "q", "gold": "a"}, "line 1: no key 'prompt': did you mean 'promt'"),
    ],
)
def test_rows_that_cannot_be_used(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, row, answers_needed=True)
    assert message in str(caught.value)


def test_rows_are_read_as_they_were_trained(bench: Workbench, tmp_path: Path) -> None:
    """The manifest of the training data says how: prompt, system message, cleaning; flags that are typed go first."""
    data = bench.jsonl([{"n": "A", "text": "b"}])
    reading = "prompt: 'Say {n}'\n    answer_key: text\n    system: Be brief.\n    clean: {lower: true}\n"
    recipe = bench.write(f"datasets:\n  - files: [{data}]\n    {reading}", "r.yaml")
    assert bench.tokenize("--config", recipe).code == 0
    training = {"resolved": {"data_folder": str(bench.tokenized / "r")}, "config": {"question_key": "other"}}
    (spec,) = specs_for(["test.jsonl"], {}, training)
    assert (spec.name, spec.prompt, spec.answer_key, spec.system, spec.clean) == (
        "test",
        "Say {n}",
        "text",
        "Be brief.",
        Cleaning(lower=True),
    )
    assert system_message(training) == "Be brief."
    (typed,) = specs_for(["test.jsonl"], {"question_key": "q", "answer_key": "a"}, training)
    assert (typed.prompt, typed.question_key, typed.answer_key) == (None, "q", "a")


def test_without_the_data_the_flags_of_training_count(tmp_path: Path) -> None:
    training = {"config": {"question_key": "q", "answer_key": "a"}, "resolved": {"data_folder": str(tmp_path / "gone")}}
    first, second = specs_for(["a/test.jsonl", "b/test.jsonl"], {}, training)
    assert (first.name, second.name) == ("test", "test 2")
    assert first.question_key == "q"
    assert system_message(training) is None
    (plain,) = specs_for(["x.jsonl"], {}, {})
    assert (plain.question_key, plain.answer_key) == ("prompt", "gold")


def test_a_recipe_without_data_sets(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("lr: 1\n")
    with pytest.raises(UserError, match="lists no data sets"):
        specs_for([], {}, {}, tmp_path / "r.yaml")
