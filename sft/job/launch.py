"""From the command to processes: tokenise, decide, show, ask, start. In a process that was started as a worker, only the last."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from sft.config.train import TrainConfig
from sft.job import ending, lease, processes
from sft.job.base import find_base_model
from sft.job.prepare import Job, facts_of, make_job, tokenise, visible_gpus
from sft.observe import run_folder
from sft.observe.header import header, iterations_text
from sft.observe.trackers import check_trackers
from tokenize_data.bases import known_documents
from tokenize_data.errors import UserError


def run(config: TrainConfig, argv: Sequence[str]) -> int:
    """`sft train`: launcher or worker, by what the environment says. `argv` are the flags as typed, for the workers."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _run_as_worker(config)
    check_trackers(wandb=config.wandb, trackio=config.trackio)
    base = find_base_model(config)
    code = tokenise(config, base)
    if code:
        return code
    job = make_job(config, base)
    if _is_finished(job):
        return processes.EXIT_FINISHED
    _compare_documents(job)
    facts = facts_of(job)
    header(Console(highlight=False), facts)
    if config.no_autoaccept_iters:
        accepted = _ask(iterations_text(facts), job.iterations)
        if accepted is None:
            return processes.EXIT_OK
        config = replace(config, iters=accepted)
        argv = [*argv, "--iters", str(accepted)]
        job = replace(job, config=config, iterations=accepted)
    with lease.held(job.folder):
        return _start(job, argv)


def _is_finished(job: Job) -> bool:
    if not run_folder.is_finished(job.folder):
        return False
    sys.stderr.write(f"sft train: this run is finished: its model is in {job.folder / 'hf'}; --id NAME repeats it from scratch\n")
    return True


def _compare_documents(job: Job) -> None:
    file = job.config.checkpoints_file
    known = known_documents(job.config.run_name, Path(file) if file else None)
    if known is not None and known != len(job.reader):
        counts = f"[documents] of checkpoints.toml says {known:,} for {job.config.run_name}, the shards have {len(job.reader):,}"
        sys.stderr.write(f"sft train: warning: {counts}: the shards' number is used\n")


def _ask(calculation: str, iterations: int) -> int | None:
    """The number of iterations that a person accepts, None where they say no."""
    if not sys.stdin.isatty():
        raise UserError(f"--no_autoaccept_iters asks, and there is no terminal: {calculation}; accept it with --iters {iterations}")
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


def _start(job: Job, argv: Sequence[str]) -> int:
    """This node's processes. A single one is this process."""
    config = job.config
    per_node = config.nproc_per_node or max(visible_gpus(), 1)
    if config.nodes * per_node == 1:
        processes.be_alone()
        return _work(job)
    place = processes.Place(per_node=per_node)
    if config.nodes > 1:
        place = processes.Place(per_node=per_node, nodes=config.nodes, node=config.rank, address=config.addr, port=config.port)
    threads = None if visible_gpus() else max(1, len(os.sched_getaffinity(0)) // per_node)
    return processes.start("train", argv, place, stacks=job.folder / "stacks", threads=threads)


def _run_as_worker(config: TrainConfig) -> int:
    base = find_base_model(config)
    if processes.PREPARED not in os.environ:
        if config.no_autoaccept_iters:
            raise UserError("--no_autoaccept_iters asks, and a worker cannot: give --iters")
        if os.environ["RANK"] == "0" and (code := tokenise(config, base)):
            return code
    job = make_job(config, base, world=int(os.environ["WORLD_SIZE"]))
    if processes.PREPARED not in os.environ and os.environ["RANK"] == "0":
        if _is_finished(job):
            return processes.EXIT_FINISHED
        header(Console(highlight=False), facts_of(job))
        with lease.held(job.folder):
            return _work(job)
    return _work(job)


def _work(job: Job) -> int:
    """Be a worker. What is slow to import is imported here."""

    def work() -> int:
        importlib.import_module("sft.engine.start").prepare_environment()
        importlib.import_module("sft.job.worker").work(job)
        return processes.EXIT_OK

    return ending.guarded("train", work)
