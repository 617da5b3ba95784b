"""Reports a run's progress to files, terminal and trackers. Only rank 0 reports."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from sft.config.recipe import recipe_text
from sft.observe import chart, report
from sft.observe.progress import Progress, duration
from sft.observe.trackers import Tracker, open_trackers
from sft.spec import metrics, run_folder
from sft.spec.run import FILE, RunSpec
from sft.worker.ending import PreemptedError, reason_of
from tokenize_data.errors import UserError, shorten
from tokenize_data.files import append_private


class Watch:
    """The interface for reporting. Rank 0 has an implementation; on other ranks nothing happens."""

    def start(self, iteration: int) -> None:
        """Training starts after `iteration`."""

    def record(self, record: dict[str, Any]) -> None:
        """Report a finished iteration."""

    def say(self, text: str) -> None:
        """Print a line."""

    def warn(self, text: str) -> None:
        """Print a warning, and keep it for the report."""

    def finish(self, target: Path) -> None:
        """Report that the model has been exported."""


class _FirstWatch(Watch):
    def __init__(self, spec: RunSpec, console: Console, stack: ExitStack) -> None:
        self._spec, self._console, self._stack = spec, console, stack
        self._file = metrics.MetricsFile(spec.folder / "metrics.jsonl")
        self._progress: Progress | None = None
        self._trackers: list[Tracker] = []
        self._written_at = 0.0
        self._began = time.monotonic()
        earlier = run_folder.read_status(spec.folder)
        self.iteration = int(earlier["iteration"]) if earlier else 0
        self.has_started = False
        self._is_status_old = False

    def start(self, iteration: int) -> None:
        spec, settings = self._spec, self._spec.settings
        self.iteration = iteration
        self._file.rewind(iteration)
        run_folder.replace_file(spec.folder / FILE, spec.text())
        run_folder.write_run_toml(
            spec.folder, config=spec.asked.as_json(), resolved=spec.facts(), versions=spec.versions
        )
        run_folder.replace_file(spec.folder / "recipe.yaml", recipe_text(spec.asked))
        self.status("running")
        self.has_started = True
        self._progress = self._stack.enter_context(Progress(self._console, spec.iterations, iteration))
        self._trackers = open_trackers(
            spec.folder,
            tensorboard=settings.output.tensorboard,
            wandb=settings.output.wandb,
            trackio=settings.output.trackio,
            run_name=spec.folder.name,
            config=spec.asked.as_json(),
            warn=self.warn,
            start=iteration,
        )
        for tracker in self._trackers:
            self._stack.callback(tracker.close)
        self._began = time.monotonic()

    def record(self, record: dict[str, Any]) -> None:
        assert self._progress is not None
        self.iteration = record["iteration"]
        written = self._file.append(record)
        self._progress.update(written)
        for tracker in self._trackers:
            tracker.log(written)
        if time.monotonic() - self._written_at > 1.0:  # programs poll this file; it is not a log
            self._written_at = time.monotonic()
            self.status("running")

    def say(self, text: str) -> None:
        self._progress.say(text) if self._progress is not None else self._console.print(text)

    def warn(self, text: str) -> None:
        with suppress(OSError), append_private(self._spec.folder / "warnings.log") as file:
            file.write(f"{' '.join(text.split())}\n".encode("utf-8", "backslashreplace"))  # for the report
        self._progress.warn(text) if self._progress is not None else self._console.print(
            f"warning: {text}", style="yellow"
        )

    def status(self, state: run_folder.State, reason: str = "") -> None:
        """Write status.json. Once training has started, a failure to write it is only a warning."""
        try:
            run_folder.write_status(
                self._spec.folder,
                state=state,
                iteration=self.iteration,
                iterations=self._spec.iterations,
                reason=reason,
            )
        except UserError as error:
            if not self.has_started:
                raise
            if not self._is_status_old:
                self._is_status_old = True
                self.warn(f"status.json was not updated: {error}")
        else:
            self._is_status_old = False

    def finish(self, target: Path) -> None:
        self.status("finished")
        folder = self._spec.folder
        records, is_best_kept = (
            metrics.read(folder / "metrics.jsonl"),
            self._spec.settings.output.early_stopping is not None,
        )
        drawn = chart.write_loss_chart(records, folder / "loss.png", mark_best=is_best_kept)
        self.say(f"done in {duration(time.monotonic() - self._began)}")
        self.say(f"{'adapter' if target.name == 'adapter' else 'model':<9} {target}")
        self.say(f"metrics   {folder / 'metrics.jsonl'}" + (f", {folder / 'loss.png'}" if drawn else ""))
        self._report()
        if not drawn:
            self.warn("loss.png was not drawn: it needs matplotlib (pip install 'megasft[plots]')")

    def _report(self) -> None:
        path = self._spec.folder / "report.html"
        try:
            report.write_report([self._spec.folder], path)
            self.say(f"report    {path}")
        except Exception as error:  # the model exists: an error in the report must not fail the run
            self.warn(
                f"report.html was not written ({type(error).__name__}: {shorten(error)}): try sft report "
                f"{self._spec.folder}"
            )


@contextmanager
def watched(spec: RunSpec, is_first: bool) -> Iterator[Watch]:
    """Open a run's files and its display. An error inside the block is recorded in status.json."""
    if not is_first:
        yield Watch()
        return
    spec.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        watch = _FirstWatch(spec, Console(highlight=False), stack)
        try:
            yield watch
        except PreemptedError as error:
            watch.status("preempted", reason=str(error))
            raise
        except BaseException as error:
            if isinstance(error, UserError) and not watch.has_started:
                raise  # keep the status of the earlier attempt
            with suppress(UserError):  # report the first error, not those that follow from it
                watch.status("failed", reason=reason_of(error))
            raise
