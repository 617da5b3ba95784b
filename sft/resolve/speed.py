"""Measures this CPU to estimate the duration of a run. For GPUs the plan estimates it."""

from __future__ import annotations

import time

import numpy as np

_SIZE, _TRIES = 768, 4
_CPU_EFFICIENCY = 0.5  # share of a bare matmul's speed that training of small models reaches


def expected_seconds(num_parameters: int, num_tokens: float) -> float:
    """Time for `num_tokens`, forward and backward: six operations per parameter and token."""
    return 6.0 * num_parameters * num_tokens / cpu_operations_per_second()


def cpu_operations_per_second() -> float:
    """Operations per second that training reaches on all cores."""
    return _matrix_speed() * _CPU_EFFICIENCY


def _matrix_speed() -> float:
    """Operations per second of a float32 matmul on all cores: the best of a few tries."""
    matrix = np.ones((_SIZE, _SIZE), np.float32)
    seconds = []
    for _ in range(_TRIES):
        began = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - began)
    return 2.0 * _SIZE**3 / min(seconds)
