"""The house rules that a program can check: small files, short functions, names that have been replaced."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("sft", "tokenize_data") for path in (ROOT / folder).rglob("*.py"))
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 300, 60
RETIRED = ("Place", "farewell", "be_alone", "Alone", "Together")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    long = [f"{name} has {length} lines" for name, length in _functions(text) if length > MOST_LINES_OF_A_FUNCTION]
    assert not long


@pytest.mark.parametrize("name", RETIRED)
def test_replaced_names_do_not_come_back(name):
    found = [str(path.relative_to(ROOT)) for path in FILES if name in _names(path.read_text())]
    assert not found


def _functions(text: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def _names(text: str) -> set[str]:
    """Of what a file defines."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)}
