"""Errors that several packages share."""

from __future__ import annotations

from tokenize_data.errors import FailedError


class TrainingError(Exception):
    """Training cannot continue. The message says what happened, in which iteration, and what to try."""


class CheckpointError(FailedError):
    """A checkpoint could not be written or read, on any process. Earlier checkpoints are intact."""
