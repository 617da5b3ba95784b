"""The checks of the data stage itself, which need neither texts nor other packages."""

from __future__ import annotations

from tokenize_data.checks import answers, repeats
from tokenize_data.checks.digests import digests_of
from tokenize_data.checks.finding import Finding
from tokenize_data.checks.texts import backend_of
from tokenize_data.reader import ShardReader

_LEAST_SHARE = 0.01  # fewer repeats are reported by `sft inspect` only


def quick(training: ShardReader, validation: ShardReader | None) -> list[Finding]:
    """Warnings about a new data set: repeats, questions in training and validation, empty answers."""
    digests = digests_of(training)
    held_out = digests_of(validation) if validation is not None else None
    backend = backend_of(training)
    frequent = answers.frequent(training, backend, digests, held_out)
    found = [*answers.empty(training, backend, len(digests)), *answers.lopsided(frequent, len(digests))]
    if validation is not None and held_out is not None:
        found += repeats.leaks(digests, held_out, (training, validation))
    found += [finding for finding in repeats.exact(training, digests) if finding.share >= _LEAST_SHARE]
    return found
