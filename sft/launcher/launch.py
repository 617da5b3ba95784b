"""From the command to processes: tokenise, decide, show, ask, start. In a process that was started as a worker, only
the last.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from sft.checkpoint import hub
from sft.config.settings import Settings
from sft.launcher import hostfile, lease, nodes, processes, torchrun
from sft.observe.header import header, iterations_text
from sft.observe.trackers import check_trackers
from sft.resolve.base import find_base_model
from sft.resolve.devices import prepare_gpus, visible_gpus
from sft.resolve.identity import refuse_another
from sft.resolve.prepare import Job, facts_of, make_job, placement_warning, tokenise
from sft.spec import run_folder
from sft.worker import ending
from tokenize_data.bases import known_documents
from tokenize_data.errors import UserError


def run(settings: Settings, argv: Sequence[str]) -> int:
    """`sft train`: launcher or worker, by what the environment says. `argv` are the flags as typed, for the workers."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _run_as_worker(settings)
    if settings.machine.hostfile is not None:
        return hostfile.run(settings, argv)
    check_trackers(wandb=settings.output.wandb, trackio=settings.output.trackio)
    if settings.output.push_to_hub is not None and settings.machine.rank == 0:
        hub.check_hub(settings.output.push_to_hub)
    start = partial(_start_here, argv=argv)
    if settings.machine.nodes > 1:
        return (
            nodes.run_first(settings, _decide, start)
            if settings.machine.rank == 0
            else nodes.run_guest(settings, start)
        )
    decided = _decide(settings)
    return decided if isinstance(decided, int) else start(decided, processes.Place(per_node=decided.layout.world), None)


def _decide(settings: Settings) -> Job | int:
    """The job, prepared and accepted, or the exit code where there is none to do."""
    base = find_base_model(settings)
    code = tokenise(settings, base)
    if code:
        return code
    job = make_job(settings, base)
    refuse_another(job)
    if (finished := _code_if_finished(job)) is not None:
        return finished
    _compare_documents(job)
    facts = facts_of(job)
    header(Console(highlight=False), facts)
    if (warning := placement_warning(job)) is not None:
        sys.stderr.write(f"sft train: warning: {warning}\n")
    if settings.schedule.no_autoaccept_iters:
        accepted = _ask(iterations_text(facts), job.iterations)
        if accepted is None:
            return processes.EXIT_OK
        job = replace(job, settings=job.settings.replace(iters=accepted), iterations=accepted)
    return job


def _code_if_finished(job: Job) -> int | None:
    """The exit code where there is nothing left to train; an upload that is still owed is made up for."""
    if not run_folder.is_finished(job.folder):
        return None
    if job.settings.output.push_to_hub is not None and not hub.is_pushed(job.folder, job.settings.output.push_to_hub):
        _push(job, job.settings.output.push_to_hub)
        return processes.EXIT_OK
    what = "adapter" if job.settings.adapters.lora else "model"
    sys.stderr.write(
        f"sft train: this run is finished: its {what} is in {job.result_folder}; --id NAME repeats it from scratch\n"
    )
    return processes.EXIT_FINISHED


def _pushed(job: Job, code: int) -> int:
    """After training. A failed upload is no failed training: it is said, and the same command repeats it."""
    if code == processes.EXIT_OK and job.settings.output.push_to_hub is not None and job.settings.machine.rank == 0:
        try:
            _push(job, job.settings.output.push_to_hub)
        except UserError as error:
            sys.stderr.write(f"sft train: warning: {error}\n")
    return code


def _push(job: Job, model_id: str) -> None:
    say = Console(highlight=False).print
    hub.push(job.folder, hub.model_folder(job.folder), model_id, public=job.settings.output.hub_public, say=say)


def _compare_documents(job: Job) -> None:
    file = job.settings.model.checkpoints_file
    known = known_documents(job.settings.data.run_name, Path(file) if file else None)
    if known is not None and known != len(job.reader):
        counts = (
            f"[documents] of checkpoints.toml says {known:,} for {job.settings.data.run_name}, the shards have "
            f"{len(job.reader):,}"
        )
        sys.stderr.write(f"sft train: warning: {counts}: the shards' number is used\n")


def _ask(calculation: str, iterations: int) -> int | None:
    """The number of iterations that a person accepts, None where they say no."""
    if not sys.stdin.isatty():
        raise UserError(
            f"--no_autoaccept_iters asks, and there is no terminal: {calculation}; accept it with --iters {iterations}"
        )
    while True:
        try:
            answer = input(f"Accept {iterations} iterations? [y/n/number] ").strip().lower()
        except EOFError:
            return None
        if answer in ("y", "yes", ""):
            return iterations
        if answer in ("n", "no"):
            return None
        if answer.isdecimal() and int(answer) > 0:
            return int(answer)


def _start_here(job: Job, place: processes.Place, end: processes.End | None, *, argv: Sequence[str]) -> int:
    """This node's processes. A single one is this process. Only the first node holds the folder's lease."""
    settings = job.settings
    with lease.held(job.folder) if settings.machine.rank == 0 else contextlib.nullcontext():
        if place.nodes * place.per_node == 1 and not settings.machine.max_restarts:
            processes.be_alone()
            return _pushed(job, _work(job))
        threads = None if visible_gpus() else max(1, len(os.sched_getaffinity(0)) // place.per_node)
        flags = nodes.workers_flags(argv, job)
        for attempt in range(settings.machine.max_restarts + 1):
            code = processes.start("train", flags, place, stacks=job.folder / "stacks", threads=threads, end=end)
            if (
                code != processes.EXIT_FAILED
                or attempt == settings.machine.max_restarts
                or (end is not None and end.reason is not None)
            ):
                break
            sys.stderr.write(
                f"sft train: starting again from the latest checkpoint (restart {attempt + 1} of "
                f"{settings.machine.max_restarts})\n"
            )
        return _pushed(job, code)


def _run_as_worker(settings: Settings) -> int:
    if processes.PREPARED in os.environ:
        return _work(make_job(settings, find_base_model(settings), world=int(os.environ["WORLD_SIZE"])))
    if settings.schedule.no_autoaccept_iters:
        raise UserError("--no_autoaccept_iters asks, and a worker cannot: give --iters")
    base = find_base_model(settings)
    store = importlib.import_module("sft.launcher.rendezvous").connect(settings.machine.node_timeout)
    if code := torchrun.prepared(store, settings, base, tokenise):
        return code
    job = torchrun.compare(store, settings, lambda: make_job(settings, base, world=int(os.environ["WORLD_SIZE"])))
    refuse_another(job)
    if os.environ["RANK"] != "0":
        return processes.EXIT_FINISHED if run_folder.is_finished(job.folder) else _work(job, store)
    if (finished := _code_if_finished(job)) is not None:
        return finished
    header(Console(highlight=False), facts_of(job))
    with lease.held(job.folder):
        return _pushed(job, _work(job, store))


def _work(job: Job, store: Any = None) -> int:
    """Be a worker. What is slow to import is imported here."""

    def work() -> int:
        interrupt = ending.Interrupt()
        interrupt.listen()
        prepare_gpus()
        importlib.import_module("sft.engine.start").prepare_environment()
        importlib.import_module("sft.worker.train").work(job, interrupt, store)
        return processes.EXIT_OK

    return ending.guarded("train", work)
