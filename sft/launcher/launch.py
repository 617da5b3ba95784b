"""`sft train`: prepare the data, resolve the run, show it, ask, and start the processes."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
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
    """Run as a launcher, or as a worker if torchrun or srun started this process. `argv` is passed to other hosts."""
    obey_standard_input()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return torchrun.run(settings)
    if settings.machine.hostfile is not None:
        return hostfile.run(settings, argv)
    return on_this_node(settings, _decide, _start)


def on_this_node(settings: Settings, decide: nodes.Decide, start: nodes.Start) -> int:
    """Prepare the run with `decide`, meet the other nodes if there are any, and `start` this node's processes."""
    machine, output = settings.machine, settings.output
    check_trackers(wandb=output.wandb, trackio=output.trackio)
    if output.push_to_hub is not None and machine.rank == 0:
        hub.check_hub(output.push_to_hub)
    if machine.nodes > 1:
        return nodes.coordinate(settings, decide, start) if machine.rank == 0 else nodes.join(settings, start)
    decided = decide(settings)
    if isinstance(decided, int):
        return decided
    return start(decided, processes.NodeSlot(per_node=decided.layout.world), None)


def _decide(settings: Settings) -> RunSpec | int:
    """Resolve the run and let the user accept it. Returns an exit code if there is nothing to do."""
    prepared = prepare(settings)
    return prepared if isinstance(prepared, int) else accept(prepared)


def prepare(settings: Settings, error_file: Path | None = None) -> RunSpec | int:
    """Tokenise and resolve the run. Returns the exit code of a failed data stage; the reason is in `error_file`."""
    base = find_base_model(settings)
    if code := tokenise(settings, base, error_file):
        return code
    spec = resolve(settings, base)
    refuse_another(spec)
    return spec


def accept(spec: RunSpec) -> RunSpec | int:
    """Show the run and ask the user if requested. Returns an exit code if there is nothing to do."""
    if (finished := code_if_finished(spec)) is not None:
        return finished
    _compare_documents(spec)
    facts = facts_of(spec)
    header(Console(highlight=False), facts)
    for warning in (placement_warning(spec), early_stopping_warning(spec)):
        if warning is not None:
            sys.stderr.write(f"sft train: warning: {warning}\n")
    if not spec.settings.schedule.no_autoaccept_iters:
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
    """Ask for the number of iterations; None if the user declines."""
    if not sys.stdin.isatty():
        raise UserError(
            f"--no_autoaccept_iters asks for confirmation, but there is no terminal: {calculation}; accept it with "
            f"--iters {iterations}"
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
    """Start this node's workers. A single worker runs in this process."""
    if slot.nodes * slot.per_node > 1 or spec.settings.machine.max_restarts:
        return start_workers(spec, slot, end)
    with lease.held(spec.folder):
        processes.set_single_process_env()
        return published(spec, work(spec))


def start_workers(
    spec: RunSpec, slot: processes.NodeSlot, end: processes.End | None, tell: Callable[[str], None] | None = None
) -> int:
    """Start each worker as a separate process. Only the first node holds the folder's lease. `tell` receives the
    reason for their end; the default prints it.
    """
    if slot.node > 0:
        return _attempts(spec, slot, end, tell or _say)
    with lease.held(spec.folder):
        return published(spec, _attempts(spec, slot, end, tell or _say))


def _say(text: str) -> None:
    processes.say("train", text)


def _attempts(spec: RunSpec, slot: processes.NodeSlot, end: processes.End | None, tell: Callable[[str], None]) -> int:
    restarts = spec.settings.machine.max_restarts
    threads = None if visible_gpus() else max(1, len(os.sched_getaffinity(0)) // slot.per_node)
    with tempfile.TemporaryDirectory(prefix="sft-run-") as scratch:
        file = Path(scratch, run_file.FILE)
        file.write_text(spec.text())
        program = ["-m", "sft.launcher.worker_process", str(file)]
        for attempt in range(restarts + 1):
            said: list[str] = []
            stacks = spec.folder / "stacks"
            code = processes.start("train", program, slot, stacks=stacks, threads=threads, end=end, tell=said.append)
            is_last = code != EXIT_FAILED or attempt == restarts or (end is not None and end.reason is not None)
            for reason in said:
                tell(reason) if is_last else _say(reason)
            if is_last:
                break
            _say(f"restarting from the latest checkpoint ({attempt + 1} of {restarts})")
    return code
