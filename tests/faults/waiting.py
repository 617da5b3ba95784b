"""Waiting for something to become true, as long as it takes on a slow and busy machine."""

from __future__ import annotations

import time
from collections.abc import Callable

HANG_SECONDS = 600.0  # against tests that never end; nothing is said about speed


def until(condition: Callable[[], bool], hang_seconds: float = HANG_SECONDS) -> bool:
    deadline = time.monotonic() + hang_seconds
    while not condition():
        if time.monotonic() > deadline:
            return condition()
        time.sleep(0.02)
    return True
