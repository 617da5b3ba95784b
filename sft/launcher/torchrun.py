"""Workers that `sft` has not started itself: those of torchrun. Rank 0 tokenises, the others wait; all compare what
they have.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from sft.config.settings import Settings
from sft.launcher import preflight
from sft.launcher.meeting import say_on_stderr
from sft.launcher.nodes import facts_to_compare
from sft.resolve.base import BaseModel
from sft.resolve.prepare import Job
from tokenize_data.errors import UserError, shorten

_TELL_SECONDS = 30.0


def prepared(store: Any, settings: Settings, base: BaseModel, tokenise: Callable[[Settings, BaseModel], int]) -> int:
    """Rank 0 runs the data stage, the others wait for it. Returns its exit code, on rank 0 alone; the others raise."""
    if os.environ["RANK"] == "0":
        code = tokenise(settings, base)
        store.set("sft/data", str(code))
        return code
    code = int(_wait(store, "sft/data", settings.machine.node_timeout, "rank 0 to tokenise the data"))
    if code:
        raise UserError("rank 0 could not prepare the data: see what it says there")
    return 0


def compare(store: Any, settings: Settings, make: Callable[[], Job]) -> Job:
    """The job, when all nodes have made the same one. The first process of each node speaks for it."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    node, nodes = int(os.environ["RANK"]) // per_node, int(os.environ["WORLD_SIZE"]) // per_node
    job, error = None, None
    try:
        job = make()
    except UserError as caught:
        error = str(caught)
    if os.environ.get("LOCAL_RANK", "0") == "0" and nodes > 1:
        mine = preflight.ready(
            node,
            per_node,
            facts_to_compare(job, settings),
            error,
            job.folder if job else Path(settings.output.save_checkpoint_dir),
        )
        store.set(f"sft/ready/{node}", json.dumps(mine.as_json()))
        if node == 0:
            store.set("sft/verdict", _verdict(store, settings, mine, nodes))
    if nodes > 1 and (
        verdict := _wait(store, "sft/verdict", settings.machine.node_timeout, "the nodes to compare what they have")
    ):
        raise UserError(verdict)
    if job is None:
        raise UserError(error or "this process cannot take part")
    return job


def _verdict(store: Any, settings: Settings, mine: preflight.Ready, nodes: int) -> str:
    """Why the run cannot start; empty where it can."""
    found = [mine]
    for node in range(1, nodes):
        said = _wait(store, f"sft/ready/{node}", settings.machine.node_timeout, f"node {node}")
        try:
            one = preflight.Ready.from_json(json.loads(said))
        except (ValueError, RecursionError) as error:
            return (
                f"what node {node} says of itself cannot be read ({shorten(error, 80)}): install the same `sft` on "
                "all nodes"
            )
        found.append(replace(one, clock_offset=0.0))  # when it was written is not known
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
                    f"waited {timeout_seconds:.0f} s for {what} ({shorten(error, 80)}): see what it says there, "
                    "or raise --node_timeout"
                ) from error
            if os.environ.get("LOCAL_RANK", "0") == "0":
                say_on_stderr(f"waiting for {what}")
