"""A few seconds for each target, and what broke it once. A longer search: python -m tests.fuzz --seconds 3600 --corpus
FOLDER.
"""

from __future__ import annotations

import pytest

from tests.fuzz.__main__ import TARGETS, fuzz

SECONDS = 5


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_breaks(target: str) -> None:
    assert fuzz(target, SECONDS)
