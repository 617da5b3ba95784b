"""Runs on several nodes: the same command on each, with its own --rank. Node 0 tokenises, resolves the run and sends
it to the others; all compare their facts, then start. With --max_restarts, the nodes meet again after a failure:
with a replacement for a lost node, or with fewer replicas if none comes in time and the layout allows it.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sft.config.settings import Settings
from sft.launcher import preflight, processes
from sft.launcher.comparison import facts_to_compare
from sft.launcher.meeting import Coordinator, Member, say_on_stderr
from sft.resolve.local import local_copy
from sft.resolve.run import resolve
from sft.spec.exit_codes import EXIT_FAILED
from sft.spec.run import RunSpec
from tokenize_data.errors import UserError

Decide = Callable[[Settings], RunSpec | int]
Start = Callable[[RunSpec, processes.NodeSlot, processes.End | None], int]


def coordinate(settings: Settings, decide: Decide, start: Start) -> int:
    """Run node 0. `decide` prepares the run and asks; if it returns an exit code, all nodes end."""
    machine = settings.machine
    coordinator = Coordinator(machine.addr, machine.port, machine.nodes, settings.data.run_name, say_on_stderr)
    stop: str | None = "node 0 was interrupted"
    try:
        decided = decide(settings)
        if isinstance(decided, int):
            stop = "node 0 ended before the start: see its output"
            return decided
        _await_all(coordinator, settings)
        for restarts_left in range(machine.max_restarts, -1, -1):
            spec, chosen = _with_present_nodes(coordinator, decided)
            attempt = _start_together(coordinator, settings, spec, chosen, restarts_left)
            code = _run_watched(coordinator, spec, start, _slot(spec, settings, 0, attempt))
            if code != EXIT_FAILED or not restarts_left:
                stop = None
                return code
            say_on_stderr(
                f"restarting from the latest checkpoint ({restarts_left} restarts left): waiting for all "
                f"{machine.nodes} nodes"
            )
            coordinator.collect(machine.replace_timeout)
    except UserError as error:
        stop = str(error)
        raise
    finally:
        if stop is not None:
            coordinator.answer(stop)
        coordinator.close()
    raise AssertionError("the last attempt returns")


def join(settings: Settings, start: Start) -> int:
    """Run any other node."""
    machine = settings.machine
    patience, is_first = machine.node_timeout, True
    while True:
        try:
            member = Member(machine.addr, machine.port, machine.rank, settings.data.run_name, patience, say_on_stderr)
            decision = member.decision(patience, say_on_stderr)
        except UserError as error:
            if is_first:
                raise
            sys.stderr.write(f"sft train: not restarting: {error}\n")
            return EXIT_FAILED
        received = RunSpec.from_json(decision["run"], "what node 0 sent")
        spec, error_here = _spec_here(received, settings, decision)
        folder = spec.folder if spec is not None else Path(settings.output.save_checkpoint_dir)
        facts = facts_to_compare(spec, settings)
        per_node = 0 if spec is None else _per_node(spec)
        ready = preflight.ready(decision["rank"], per_node, facts, error_here, folder)
        member.say_ready(ready, machine.node_timeout)
        if spec is None or error_here is not None:
            raise UserError(error_here or "this node cannot take part")
        code = _run_watched(member, spec, start, _slot(spec, settings, decision["rank"], decision["token"]))
        if code != EXIT_FAILED or not decision["restarts_left"]:
            return code
        say_on_stderr("this attempt has ended: waiting for node 0 to start the next one")
        patience, is_first = machine.replace_timeout + 60.0, False


def _await_all(coordinator: Coordinator, settings: Settings) -> None:
    machine = settings.machine
    present = coordinator.collect(machine.node_timeout)
    missing = [node for node in range(1, machine.nodes) if node not in present]
    if missing:
        raise UserError(
            f"node {', '.join(map(str, missing))} did not connect within {machine.node_timeout:.0f} s: start the same "
            f"command there with --rank {missing[0]}, the same --addr and --port, and check that it can reach this host"
        )


def _with_present_nodes(coordinator: Coordinator, decided: RunSpec) -> tuple[RunSpec, list[int]]:
    """The run for as many of the present nodes as the layout allows, and their numbers."""
    machine, present = decided.asked.machine, coordinator.collect(0)
    came = f"{len(present) + 1} of {machine.nodes} nodes connected within {machine.replace_timeout:.0f} s"
    refusal = ""
    for count in range(len(present) + 1, 0, -1):
        try:
            spec = resolve(decided.asked.replace(nodes=count, max_restarts=0), decided.base)
        except UserError as error:
            refusal = refusal or str(error)
            continue
        if count < machine.nodes:
            say_on_stderr(f"{came}: continuing with {count}: {spec.layout} instead of {decided.layout}")
        return spec, present[: count - 1]
    raise UserError(f"{came}, too few: {refusal}")


def _start_together(
    coordinator: Coordinator, settings: Settings, spec: RunSpec, chosen: Sequence[int], restarts_left: int
) -> str:
    """Start the nodes. Returns the attempt's name, which only its nodes know."""
    token = _leave_token(spec.folder)
    decision = {
        "run": spec.as_json(),
        "folder": str(spec.folder.resolve()),
        "token": token.name,
        "restarts_left": restarts_left,
    }
    mine = preflight.ready(0, _per_node(spec), facts_to_compare(spec, settings), None, spec.folder)
    try:
        nodes = coordinator.agree(decision, chosen, mine, settings.machine.node_timeout)
    finally:
        token.unlink(missing_ok=True)
    for line in preflight.table(nodes):
        say_on_stderr(line)
    if lines := preflight.differences(nodes):
        raise UserError(f"the nodes differ: {'; '.join(lines)}")
    coordinator.answer(None)
    return token.name


def _spec_here(received: RunSpec, settings: Settings, decision: dict[str, Any]) -> tuple[RunSpec | None, str | None]:
    """Returns (the run with this node's folders, why this node cannot take part or None)."""
    try:
        spec = local_copy(received, settings)
    except UserError as error:
        return None, str(error)
    if not (spec.folder / decision["token"]).exists():
        where = f"{spec.folder.resolve()} is not the folder that node 0 calls {decision['folder']}"
        return spec, f"{where}: put --save_checkpoint_dir on storage that all nodes share"
    return spec, None


def _slot(spec: RunSpec, settings: Settings, node: int, attempt: str) -> processes.NodeSlot:
    machine = settings.machine
    return processes.NodeSlot(
        per_node=_per_node(spec),
        nodes=spec.settings.machine.nodes,
        node=node,
        address=machine.addr,
        port=machine.port + 1,
        attempt=attempt,
    )


def _run_watched(meeting: Coordinator | Member, spec: RunSpec, start: Start, slot: processes.NodeSlot) -> int:
    """Run on this node, until another node is lost. Tell the others if this node fails."""
    end = processes.End()
    with meeting.watching(end.because):
        code = start(spec, slot, end)
        if code == EXIT_FAILED and end.reason is None:
            meeting.disconnect(f"node {slot.node} failed: see its output")
    return code


def _per_node(spec: RunSpec) -> int:
    return spec.layout.world // spec.settings.machine.nodes


def _leave_token(folder: Path) -> Path:
    """Write a file that the other nodes look for, to find out whether they share this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / f".meeting-{secrets.token_hex(8)}"
    token.touch()
    return token
