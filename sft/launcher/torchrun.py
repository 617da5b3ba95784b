"""Workers started by torchrun or srun. Rank 0 tokenises and resolves the run; the others receive it."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console

from sft.config.settings import Settings
from sft.launcher import lease, preflight
from sft.launcher.comparison import facts_to_compare
from sft.launcher.meeting import say_on_stderr
from sft.launcher.publish import code_if_finished, published
from sft.launcher.worker_process import work
from sft.observe.header import header
from sft.resolve.base import find_base_model
from sft.resolve.data_stage import tokenise
from sft.resolve.identity import refuse_another
from sft.resolve.local import local_copy
from sft.resolve.run import resolve
from sft.resolve.summary import facts_of
from sft.spec import run_folder
from sft.spec.exit_codes import EXIT_FINISHED
from sft.spec.run import RunSpec
from tokenize_data.errors import UserError, shorten

_TELL_SECONDS = 30.0


def run(settings: Settings) -> int:
    if settings.schedule.no_autoaccept_iters:
        raise UserError("--no_autoaccept_iters asks for confirmation, and a worker cannot: give --iters")
    store = importlib.import_module("sft.launcher.rendezvous").connect(settings.machine.node_timeout)
    return _first(store, settings) if os.environ["RANK"] == "0" else _other(store, settings)


def _first(store: Any, settings: Settings) -> int:
    message: dict[str, Any] = {"error": "rank 0 could not prepare the run: see its output"}
    try:
        base = find_base_model(settings)
        if code := tokenise(settings, base):
            message["error"] = "rank 0 could not prepare the data: see its output"
            return code
        spec = resolve(settings, base, world=int(os.environ["WORLD_SIZE"]))
        message = {"run": spec.as_json()}
    finally:
        store.set("sft/run", json.dumps(message))
    _compare(store, settings, spec, None)
    refuse_another(spec)
    if (finished := code_if_finished(spec)) is not None:
        return finished
    header(Console(highlight=False), facts_of(spec))
    with lease.held(spec.folder):
        return published(spec, work(spec, store))


def _other(store: Any, settings: Settings) -> int:
    message = json.loads(_wait(store, "sft/run", settings.machine.node_timeout, "rank 0 to prepare the run"))
    if "error" in message:
        raise UserError(message["error"])
    spec, error = RunSpec.from_json(message["run"], "what rank 0 sent"), None
    try:
        spec = local_copy(spec, settings)
    except UserError as caught:
        error = str(caught)
    _compare(store, settings, spec, error)
    if error is not None:
        raise UserError(error)
    refuse_another(spec)
    return EXIT_FINISHED if run_folder.is_finished(spec.folder) else work(spec, store)


def _compare(store: Any, settings: Settings, spec: RunSpec, error: str | None) -> None:
    """Raise UserError if nodes differ. The first process of each node reports for it."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    node, nodes = int(os.environ["RANK"]) // per_node, int(os.environ["WORLD_SIZE"]) // per_node
    if nodes == 1:
        return
    if os.environ.get("LOCAL_RANK", "0") == "0":
        facts = facts_to_compare(None if error else spec, settings)
        folder = spec.folder if error is None else Path(settings.output.save_checkpoint_dir)
        mine = preflight.ready(node, per_node, facts, error, folder)
        store.set(f"sft/ready/{node}", json.dumps(mine.as_json()))
        if node == 0:
            store.set("sft/verdict", _verdict(store, settings, mine, nodes))
    if verdict := _wait(store, "sft/verdict", settings.machine.node_timeout, "the nodes to compare what they have"):
        raise UserError(verdict)


def _verdict(store: Any, settings: Settings, mine: preflight.Ready, nodes: int) -> str:
    """Why the run cannot start; empty if it can."""
    found = [mine]
    for node in range(1, nodes):
        report = _wait(store, f"sft/ready/{node}", settings.machine.node_timeout, f"node {node}")
        try:
            one = preflight.Ready.from_json(json.loads(report))
        except (ValueError, RecursionError) as error:
            return (
                f"the report of node {node} cannot be read ({shorten(error, 80)}): install the same `sft` on all nodes"
            )
        found.append(replace(one, clock_offset=0.0))  # the time of writing is unknown
    for line in preflight.table(found):
        say_on_stderr(line)
    lines = preflight.differences(found)
    return f"the nodes differ: {'; '.join(lines)}" if lines else ""


def _wait(store: Any, key: str, timeout_seconds: float, what: str) -> str:
    waited = 0.0
    while True:
        step = min(_TELL_SECONDS, timeout_seconds - waited)
        try:
            store.wait([key], timedelta(seconds=step))
            return str(store.get(key).decode())
        except Exception as error:  # torch's own class of it is private
            waited += step
            if waited >= timeout_seconds:
                raise UserError(
                    f"waited {timeout_seconds:.0f} s for {what} ({shorten(error, 80)}): see its output, or raise "
                    "--node_timeout"
                ) from error
            if os.environ.get("LOCAL_RANK", "0") == "0":
                say_on_stderr(f"waiting for {what}")
