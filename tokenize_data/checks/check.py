"""Runs all checks of a data set, in the order of the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenize_data.checks import answers, near, outliers, repeats, special
from tokenize_data.checks.digests import Digests, digests_of
from tokenize_data.checks.finding import Finding
from tokenize_data.checks.private import private
from tokenize_data.checks.texts import Text, backend_of, sample, texts_of
from tokenize_data.dataset import DatasetSpec, reading_of
from tokenize_data.dataset_info import expanded, is_entry
from tokenize_data.examples import read_examples
from tokenize_data.reader import ShardReader

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Report:
    """The findings. `num_exact` documents were compared token by token, `num_read` as text; `skipped` lists what could
    not be checked, and why.
    """

    findings: tuple[Finding, ...]
    frequent: tuple[answers.Frequent, ...]
    num_exact: int
    num_read: int
    num_documents: int
    skipped: tuple[str, ...]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.is_warning]

    def scope(self) -> str:
        """How much of the data was checked."""
        if self.num_exact == self.num_read == self.num_documents:
            return f"all {self.num_documents:,} documents were checked"
        return (
            f"{self.num_exact:,} of {self.num_documents:,} documents were compared token by token, {self.num_read:,} "
            "read as text"
        )


def check(
    reader: ShardReader,
    *,
    validation: ShardReader | None,
    against: Sequence[str] = (),
    keys: Mapping[str, Any] | None = None,
    most_texts: int,
    progress: Progress | None = None,
) -> Report:
    """Check a data set. `against` are test files, read by `keys`, or as the training data was."""
    step = _steps(progress)
    tests = _tests(reader, against, keys)  # first, so that a wrong name fails at once
    backend = backend_of(reader)
    digests = digests_of(reader, step("comparing documents"))
    held_out = digests_of(validation, step("comparing validation documents")) if validation is not None else None
    numbers = sample(len(reader), most_texts)
    texts = texts_of(reader, backend, numbers, step("reading documents"))
    frequent = answers.frequent(reader, backend, digests, held_out)
    findings = [
        *answers.empty(reader, backend, len(digests)),
        *answers.lopsided(frequent, len(digests)),
        *_leaks(reader, validation, digests, held_out, texts),
        *_against(tests, texts),
        *repeats.exact(reader, digests),
        *repeats.conflicts(reader, digests),
        *(near.within(texts) if near.is_available() else []),
        *special.special_tokens(reader, backend, numbers),
        *private(texts),
        *answers.cut_off(reader, len(digests)),
        *answers.unfinished(texts),
        *answers.within_question(texts),
        *outliers.languages(texts),
        *outliers.lengths(reader, len(digests)),
    ]
    return Report(tuple(findings), tuple(frequent), len(digests), len(texts), len(reader), tuple(_skipped()))


def _leaks(
    reader: ShardReader,
    validation: ShardReader | None,
    digests: Digests,
    held_out: Digests | None,
    texts: Sequence[Text],
) -> Iterator[Finding]:
    if validation is None or held_out is None:
        return
    yield from repeats.leaks(digests, held_out, (reader, validation))
    if near.is_available():
        others = texts_of(validation, backend_of(validation), sample(len(validation), len(texts)))
        yield from near.alike(texts, others, "the validation set")


def _tests(reader: ShardReader, files: Sequence[str], keys: Mapping[str, Any] | None) -> dict[str, list[Text]]:
    """The rows of test files, by file name, read by `keys`, or as the training data was."""
    reading = {**reading_of(reader.manifest.datasets[0]), **(keys or {})}
    if keys:
        for key in ("prompt", "columns"):  # they use other fields than those named now
            reading.pop(key, None)
    found = {}
    for file in files:
        named = DatasetSpec(files=(file,)) if is_entry(file) else DatasetSpec(files=(file,), **reading)
        (spec,) = expanded([named])
        examples = read_examples(spec, answers_needed=False)
        found[file] = [
            Text(None, Path(example.place).name, example.question if example.prompt else "", example.text or "")
            for example in examples.rows
        ]
    return found


def _against(tests: Mapping[str, Sequence[Text]], texts: Sequence[Text]) -> Iterator[Finding]:
    for file, others in tests.items():
        name = Path(file).name
        found = [*near.equal(texts, others, name), *near.alike(texts, others, name)]
        if not found:
            text = f"none of the {len(others):,} rows of {name} is among the trained ones"
            found = [Finding(f"checked against {name}", text, is_warning=False)]
        yield from found


def _skipped() -> Iterator[str]:
    if not near.is_available():
        yield "near duplicates: they need the package rensa (pip install 'megasft[checks]')"
    if not outliers.knows_languages():
        yield "languages, only scripts were told apart: they need py3langid (pip install 'megasft[checks]')"


def _steps(progress: Progress | None) -> Callable[[str], Callable[[int, int], None] | None]:
    def named(name: str) -> Callable[[int, int], None] | None:
        return (lambda done, total: progress(name, done, total)) if progress is not None else None

    return named
