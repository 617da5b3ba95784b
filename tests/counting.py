"""How much work is done, counted instead of timed: the same on every machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def lines_run(work: Callable[[], Any]) -> int:
    """How many lines of Python are executed. What numpy does in one call counts as one."""
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def bytes_read() -> int:
    """By this process so far, with read(2) and its like; pages of mapped files are not among them."""
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])
