"""Tracks which trials are done and which is next. All state is in the sweep's folder, so a sweep can be resumed."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sft.config.recipe import read_recipe
from sft.launcher import lease
from sft.spec import run_folder
from sft.spec.exit_codes import EXIT_FINISHED, EXIT_OK, EXIT_PREEMPTED, EXIT_USER_ERROR, signal_name
from sft.sweep.grid import Sweep, Trial
from sft.sweep.pool import Pool, Task, make_slots
from tokenize_data.errors import UserError
from tokenize_data.files import append_private

_WAIT_SECONDS = 120.0
_PLACE = re.compile(r"\{run\}|\{model\}")
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a sweep records about a trial, besides the run's own folder."""

    failures: int = 0
    reason: str = ""
    is_refused: bool = False  # its settings are invalid: a retry would fail again
    has_followed: bool = False  # the `after` commands have run


def recipe_file(sweep: Sweep, trial: Trial) -> Path:
    return sweep.folder / "trials" / f"{trial.name}.yaml"


def train_command(recipe: Path) -> list[str]:
    return [sys.executable, "-m", "sft", "train", "--config", str(recipe)]


def run_of(trial: Trial) -> Path | None:
    """The run's folder, None before it exists."""
    root = Path(trial.values["save_checkpoint_dir"])
    found = [folder for folder in sorted(root.iterdir()) if (folder / "status.json").exists()] if root.is_dir() else []
    return found[0] if found else None


def record_of(sweep: Sweep, trial: Trial) -> Record:
    try:
        return Record(**json.loads(recipe_file(sweep, trial).with_suffix(".json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return Record()


def state_of(sweep: Sweep, trial: Trial) -> str:
    """The state: finished, failed, refused, interrupted or waiting."""
    run, record = run_of(trial), record_of(sweep, trial)
    if run is not None and run_folder.result_of(run) is not None:
        return "finished"
    if record.is_refused:
        return "refused"
    if record.failures > sweep.retries:
        return "failed"
    return "interrupted" if run is not None else "waiting"


def prepare(sweep: Sweep, *, only: int | None = None, forget_failures: bool = False) -> None:
    """Write the trials' recipes. Raises UserError if a trial has started with other settings."""
    (sweep.folder / "trials").mkdir(parents=True, exist_ok=True)
    for trial in sweep.trials if only is None else [sweep.trials[only]]:
        file = recipe_file(sweep, trial)
        if file.exists() and run_of(trial) is not None and (before := read_recipe(file)) != dict(trial.values):
            keys = [
                key
                for key in {**before, **trial.values}
                if before.get(key) != trial.values.get(key) and key != "run_name"
            ]
            raise UserError(
                f"{file} was run with another {', '.join(keys)}: give the sweep another name, or another --out"
            )
        run_folder.replace_file(file, trial.recipe)
        record = record_of(sweep, trial)
        if record.is_refused or (forget_failures and record.failures):
            _remember(
                sweep, trial, replace(record, is_refused=False, failures=0 if forget_failures else record.failures)
            )


class Runner:
    """Runs unfinished trials until they finish or have failed too often."""

    def __init__(self, sweep: Sweep, say: Say, changed: Callable[[], None]) -> None:
        self._sweep, self._say, self._changed = sweep, say, changed
        self._trials = {trial.name: trial for trial in sweep.trials}

    def run(self, only: int | None = None) -> str | None:
        """Run all trials, or one by number. Returns the name of the signal that ended the sweep, or None."""
        chosen = [trial for trial in self._sweep.trials if only is None or trial.number == only]
        done = [trial for trial in chosen if state_of(self._sweep, trial) in ("finished", "failed")]
        self._waiting = deque(trial for trial in chosen if trial not in done)
        self._at, self._all = len(done), len(chosen)
        if done:
            self._say(f"{len(done)} of {len(chosen)} trials are done already")
        for trial in done:
            self._follow(trial)
        pool = Pool(make_slots(self._sweep.parallel if only is None else 1))
        pool.run(self._next, self._ended)
        return pool.signal

    def _next(self) -> Task | None:
        if not self._waiting:
            return None
        trial = self._waiting.popleft()
        if (run := run_of(trial)) is not None and not lease.is_free(run, _WAIT_SECONDS):
            self._say(f"{trial.name}: is still running elsewhere: skipped")
            return self._next()
        word = "goes on" if run is not None else "starts"
        self._say(f"{trial.name}: {word}")
        file = recipe_file(self._sweep, trial)
        return Task(name=trial.name, command=train_command(file), log=file.with_suffix(".log"))

    def _ended(self, task: Task, code: int, seconds: float) -> None:
        sweep, trial = self._sweep, self._trials[task.name]
        record = record_of(sweep, trial)
        run = run_of(trial)
        has_result = run is not None and run_folder.result_of(run) is not None
        if code in (EXIT_OK, EXIT_FINISHED) and has_result:
            self._at += 1
            self._say(f"{trial.name}: finished in {seconds:.0f} s ({self._at} of {self._all})")
            self._follow(trial)
        elif code == EXIT_PREEMPTED:
            self._say(f"{trial.name}: stopped by a signal, saved")
            self._waiting.append(trial)
        else:
            reason = _last_line(task.log)
            if code in (EXIT_OK, EXIT_FINISHED):
                where = f"no model in {run}" if run is not None else "no run's folder"
                reason = f"it ended as if finished, and left {where}; its last output: {reason or 'none'}"
            elif code < 0:
                reason = f"it was killed ({signal_name(-code)}): out of memory, or from outside?"
            record = replace(record, failures=record.failures + 1, reason=reason, is_refused=code == EXIT_USER_ERROR)
            _remember(sweep, trial, record)
            again = not record.is_refused and record.failures <= sweep.retries
            what = f"tried again ({record.failures} of {sweep.retries})" if again else "given up"
            self._say(f"{trial.name}: failed (exit code {code}), {what}: {record.reason}")
            if again:
                self._waiting.append(trial)
        self._changed()

    def _follow(self, trial: Trial) -> None:
        """Run the `after` commands, once."""
        sweep, run, record = self._sweep, run_of(trial), record_of(self._sweep, trial)
        if not sweep.after or record.has_followed or run is None or run_folder.result_of(run) is None:
            return
        model = run / ("hf" if (run / "hf").is_dir() else "adapter")
        places = {"{run}": str(run), "{model}": str(model)}
        for line in sweep.after:
            words = [_PLACE.sub(lambda found: places[found[0]], word) for word in shlex.split(line)]
            command = [sys.executable, "-m", *words] if words[:1] == ["sft"] else words
            with append_private(recipe_file(sweep, trial).with_suffix(".log")) as log:
                try:
                    code = subprocess.run(
                        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                    ).returncode
                except OSError as error:
                    raise UserError(
                        f"after: {line!r} cannot be started: {error.strerror}: check the command"
                    ) from error
            if code:
                self._say(
                    f"{trial.name}: {words[0]} after it failed (exit code {code}): see {log.name}; the next "
                    "start tries again"
                )
                return
        _remember(sweep, trial, replace(record, has_followed=True))


def _remember(sweep: Sweep, trial: Trial, record: Record) -> None:
    run_folder.replace_file(recipe_file(sweep, trial).with_suffix(".json"), json.dumps(asdict(record)) + "\n")


def _last_line(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][-300:] if lines else ""
    return ""
