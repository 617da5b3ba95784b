"""`sft train`: prepare the data, resolve the run, show it, ask, and start the processes."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from sft.checkpoint import hub
from sft.config.settings import Settings
from sft.launcher import hostfile, lease, nodes, processes, torchrun
from sft.launcher.publish import code_if_finished, published
from sft.launcher.remote import obey_standard_input
from sft.launcher.worker_process import work
from sft.observe.header import header, iterations_text
from sft.observe.trackers import check_trackers
from sft.resolve.base import find_base_model
from sft.resolve.data_stage import tokenise
from sft.resolve.devices import visible_gpus
from sft.resolve.identity import refuse_another
from sft.resolve.run import resolve
from sft.resolve.summary import early_stopping_warning, facts_of, placement_warning
from sft.spec import run as run_file
from sft.spec.exit_codes import EXIT_FAILED, EXIT_OK
from sft.spec.run import RunSpec
from tokenize_data.bases import known_documents
from tokenize_data.errors import UserError


def run(settings: Settings, argv: Sequence[str]) -> int:
    """As a launcher, or, where torchrun or srun has started this process, as a worker. `argv` is for other hosts."""
    obey_standard_input()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return torchrun.run(settings)
    machine, output = settings.machine, settings.output
    if machine.hostfile is not None:
        return hostfile.run(settings, argv)
    check_trackers(wandb=output.wandb, trackio=output.trackio)
    if output.push_to_hub is not None and machine.rank == 0:
        hub.check_hub(output.push_to_hub)
    if machine.nodes > 1:
        return nodes.coordinate(settings, _decide, _start) if machine.rank == 0 else nodes.join(settings, _start)
    decided = _decide(settings)
    if isinstance(decided, int):
        return decided
    return _start(decided, processes.NodeSlot(per_node=decided.layout.world), None)


def _decide(settings: Settings) -> RunSpec | int:
    """The run, resolved and accepted, or an exit code where there is nothing to do."""
    base = find_base_model(settings)
    code = tokenise(settings, base)
    if code:
        return code
    spec = resolve(settings, base)
    refuse_another(spec)
    if (finished := code_if_finished(spec)) is not None:
        return finished
    _compare_documents(spec)
    facts = facts_of(spec)
    header(Console(highlight=False), facts)
    for warning in (placement_warning(spec), early_stopping_warning(spec)):
        if warning is not None:
            sys.stderr.write(f"sft train: warning: {warning}\n")
    if not settings.schedule.no_autoaccept_iters:
        return spec
    accepted = _ask(iterations_text(facts), spec.iterations)
    return EXIT_OK if accepted is None else _with_iterations(spec, accepted)


def _with_iterations(spec: RunSpec, iterations: int) -> RunSpec:
    asked, settings = (part.replace(iters=iterations) for part in (spec.asked, spec.settings))
    return replace(spec, asked=asked, settings=settings)


def _compare_documents(spec: RunSpec) -> None:
    file, name = spec.asked.model.checkpoints_file, spec.settings.data.run_name
    known = known_documents(name, Path(file) if file else None)
    if known is not None and known != spec.data.documents:
        counts = f"[documents] of checkpoints.toml has {known:,} for {name}, the shards have {spec.data.documents:,}"
        sys.stderr.write(f"sft train: warning: {counts}: using the shards' number\n")


def _ask(calculation: str, iterations: int) -> int | None:
    """The number of iterations that the user accepts; None for no."""
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


def _start(spec: RunSpec, slot: processes.NodeSlot, end: processes.End | None) -> int:
    """This node's processes; a single one is this process. Only the first node holds the lease of the folder."""
    with lease.held(spec.folder) if slot.node == 0 else contextlib.nullcontext():
        if slot.nodes * slot.per_node == 1 and not spec.settings.machine.max_restarts:
            processes.set_single_process_env()
            code = work(spec)
        else:
            code = _start_workers(spec, slot, end)
        return published(spec, code) if slot.node == 0 else code


def _start_workers(spec: RunSpec, slot: processes.NodeSlot, end: processes.End | None) -> int:
    restarts = spec.settings.machine.max_restarts
    threads = None if visible_gpus() else max(1, len(os.sched_getaffinity(0)) // slot.per_node)
    with tempfile.TemporaryDirectory(prefix="sft-run-") as scratch:
        file = Path(scratch, run_file.FILE)
        file.write_text(spec.text())
        program = ["-m", "sft.launcher.worker_process", str(file)]
        for attempt in range(restarts + 1):
            stacks = spec.folder / "stacks"
            code = processes.start("train", program, slot, stacks=stacks, threads=threads, end=end)
            if code != EXIT_FAILED or attempt == restarts or (end is not None and end.reason is not None):
                break
            sys.stderr.write(f"sft train: restarting from the latest checkpoint ({attempt + 1} of {restarts})\n")
    return code
