"""What a run tells the world while it runs: its files, its screen, its trackers. Only the first process speaks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from sft.job.prepare import Job, config_values, resolved_facts, versions
from sft.job.processes import reason_of
from sft.observe import chart, metrics, run_folder
from sft.observe.progress import Progress, duration
from sft.observe.trackers import Tracker, open_trackers


class Watch:
    """What a process tells the world: the first one everything, the others nothing."""

    def record(self, record: dict[str, Any]) -> None:
        """An iteration is done."""

    def finish(self, target: Path) -> None:
        """The model is exported."""


class _FirstWatch(Watch):
    def __init__(self, job: Job, progress: Progress, console: Console, trackers: list[Tracker]) -> None:
        self._job, self._progress, self._console, self._trackers = job, progress, console, trackers
        self._file = metrics.MetricsFile(job.folder / "metrics.jsonl")
        self._file.rewind(0)
        self._said = 0.0
        self._began = time.monotonic()
        self.iteration = 0

    def record(self, record: dict[str, Any]) -> None:
        self.iteration = record["iteration"]
        written = self._file.append(record)
        self._progress.update(written)
        for tracker in self._trackers:
            tracker.log(written)
        if time.monotonic() - self._said > 1.0:  # a file that programs poll, not a log
            self._said = time.monotonic()
            self.status("running")

    def status(self, state: run_folder.State, reason: str = "") -> None:
        run_folder.write_status(self._job.folder, state=state, iteration=self.iteration, iterations=self._job.iterations, reason=reason)

    def finish(self, target: Path) -> None:
        self.status("finished")
        folder = self._job.folder
        drawn = chart.write_loss_chart(metrics.read(folder / "metrics.jsonl"), folder / "loss.png")
        self._progress.say(f"done in {duration(time.monotonic() - self._began)}")
        self._progress.say(f"model     {target}")
        self._progress.say(f"metrics   {folder / 'metrics.jsonl'}" + (f", {folder / 'loss.png'}" if drawn else ""))
        if not drawn:
            self._progress.warn("loss.png was not drawn: it needs matplotlib (pip install 'sft[plots]')")


@contextmanager
def watched(job: Job, is_first: bool) -> Iterator[Watch]:
    """The run's files and what is on the screen; what goes wrong is written into status.json."""
    if not is_first:
        yield Watch()
        return
    console = Console(highlight=False)
    folder = job.folder
    folder.mkdir(parents=True, exist_ok=True)
    run_folder.write_run_toml(folder, config=config_values(job.config), resolved=resolved_facts(job), versions=versions())
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(console, job.iterations))
        trackers = open_trackers(
            folder, tensorboard=job.config.tensorboard, wandb=job.config.wandb, trackio=job.config.trackio, run_name=folder.name,
            config=config_values(job.config), warn=progress.warn,
        )  # fmt: skip
        for tracker in trackers:
            stack.callback(tracker.close)
        watch = _FirstWatch(job, progress, console, trackers)
        watch.status("running")
        try:
            yield watch
        except BaseException as error:
            watch.status("failed", reason=reason_of(error))
            raise
