"""Errors that several packages share."""

from __future__ import annotations

from tokenize_data.errors import FailedError


class TrainingError(Exception):
    """Training cannot go on. The message is for a person: what happened, in which iteration, what to try."""


class CheckpointError(FailedError):
    """A checkpoint was not written or read: on every process alike. The checkpoints before it are as they were."""
