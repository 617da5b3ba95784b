"""Several nodes: the same command on each, with its own --rank. Node 0 tokenises and asks; all compare what they have,
then start.

After a failure, with --max_restarts, they meet again: with a replacement for a node that was lost, or, where none comes
in time and the layout allows it, with fewer replicas.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sft.config.settings import Settings
from sft.launcher import preflight, processes
from sft.launcher.meeting import Guest, Host, say_on_stderr
from sft.resolve.base import find_base_model
from sft.resolve.prepare import Job, make_job, versions
from sft.resolve.question import batch_values
from tokenize_data.errors import UserError

# What may differ from node to node.
_OWN = (
    "rank",
    "nodes",
    "addr",
    "config",
    "data",
    "val",
    "datasets",
    "val_datasets",
    "tokenized_data_dir",
    "checkpoint",
    "checkpoints_file",
    "save_checkpoint_dir",
    "no_autoaccept_iters",
    "retokenize",
    "hostfile",
)
_COMPARED = ("sft", "torch", "deepspeed", "transformers")
Decide = Callable[[Settings], Job | int]
Run = Callable[[Job, processes.Place, processes.End], int]


def run_first(settings: Settings, decide: Decide, run: Run) -> int:
    """Node 0. `decide` prepares and asks; an exit code from it is the end on all nodes."""
    host = Host(
        settings.machine.addr, settings.machine.port, settings.machine.nodes, settings.data.run_name, say_on_stderr
    )
    stop: str | None = "node 0 was interrupted"
    try:
        decided = decide(settings)
        if isinstance(decided, int):
            stop = "node 0 has ended before the start: see what it says there"
            return decided
        _await_all(host, settings)
        for restarts_left in range(settings.machine.max_restarts, -1, -1):
            job, chosen = _of_those_who_came(host, decided)
            attempt = _start_together(host, settings, job, chosen, restarts_left)
            code = _run_watched(host, job, run, attempt)
            if code != processes.EXIT_FAILED or not restarts_left:
                stop = None
                return code
            say_on_stderr(
                f"another attempt from the latest checkpoint ({restarts_left} left): waiting for all "
                f"{settings.machine.nodes} nodes"
            )
            host.collect(settings.machine.replace_timeout)
    except UserError as error:
        stop = str(error)
        raise
    finally:
        if stop is not None:
            host.answer(stop)
        host.close()
    raise AssertionError("the last attempt returns")


def run_guest(settings: Settings, run: Run) -> int:
    """Another node."""
    patience, is_first = settings.machine.node_timeout, True
    while True:
        try:
            guest = Guest(
                settings.machine.addr,
                settings.machine.port,
                settings.machine.rank,
                settings.data.run_name,
                patience,
                say_on_stderr,
            )
            decision = guest.decision(patience, say_on_stderr)
        except UserError as error:
            if is_first:
                raise
            sys.stderr.write(f"sft train: no other attempt: {error}\n")
            return processes.EXIT_FAILED
        mine = _as_decided(settings, decision)
        job, error_here = _job_here(mine, decision)
        folder = job.folder if job is not None else Path(settings.output.save_checkpoint_dir)
        guest.say_ready(
            preflight.ready(mine.machine.rank, _per_node(job), facts_to_compare(job, settings), error_here, folder),
            settings.machine.node_timeout,
        )
        if job is None or error_here is not None:
            raise UserError(error_here or "this node cannot take part")
        code = _run_watched(guest, job, run, decision["token"])
        if code != processes.EXIT_FAILED or not decision["restarts_left"]:
            return code
        say_on_stderr("this attempt has ended: back to node 0 for the next one")
        patience, is_first = settings.machine.replace_timeout + 60.0, False


def _as_decided(settings: Settings, decision: dict[str, Any]) -> Settings:
    """Whether there is validation is node 0's to say: it has made the shards, and names of files may be missing
    here.
    """
    iters, nodes, rank = (decision[name] for name in ("iters", "nodes", "rank"))
    settings = settings.replace(iters=iters, nodes=nodes, rank=rank, max_restarts=0, **decision["batch"])
    if settings.data.has_validation == decision["has_validation"]:
        return settings
    return settings.replace(val=("as node 0",) if decision["has_validation"] else (), val_datasets=())


def _await_all(host: Host, settings: Settings) -> None:
    here = host.collect(settings.machine.node_timeout)
    missing = [node for node in range(1, settings.machine.nodes) if node not in here]
    if missing:
        raise UserError(
            f"node {', '.join(map(str, missing))} did not come within {settings.machine.node_timeout:.0f} s: start "
            "the same "
            "command there with "
            f"--rank {missing[0]}, the same --addr and --port, and see that this host can be reached"
        )


def _of_those_who_came(host: Host, decided: Job) -> tuple[Job, list[int]]:
    """The job for as many of the nodes that are here as a layout takes, and their numbers."""
    settings, here = decided.settings, host.collect(0)
    refusal = ""
    for count in range(len(here) + 1, 0, -1):
        try:
            job = make_job(settings.replace(nodes=count, max_restarts=0), decided.base)
        except UserError as error:
            refusal = refusal or str(error)
            continue
        if count < settings.machine.nodes:
            say_on_stderr(
                f"{len(here) + 1} of {settings.machine.nodes} nodes came within "
                f"{settings.machine.replace_timeout:.0f} s: "
                f"going on with {count}: {job.layout} in place of {decided.layout}"
            )
        return job, here[: count - 1]
    raise UserError(
        f"{len(here) + 1} of {settings.machine.nodes} nodes came within {settings.machine.replace_timeout:.0f} "
        f"s, too few: {refusal}"
    )


def _start_together(host: Host, settings: Settings, job: Job, chosen: Sequence[int], restarts_left: int) -> str:
    """Returns a name of this attempt that only its nodes know."""
    token = _leave_token(job.folder)
    decision = {
        "iters": job.iterations,
        "has_validation": settings.data.has_validation,
        "batch": batch_values(job.settings),
        "folder": str(job.folder.resolve()),
        "token": token.name,
        "restarts_left": restarts_left,
    }
    mine = preflight.ready(0, _per_node(job), facts_to_compare(job, settings), None, job.folder)
    try:
        nodes = host.agree(decision, chosen, mine, settings.machine.node_timeout)
    finally:
        token.unlink(missing_ok=True)
    for line in preflight.table(nodes):
        say_on_stderr(line)
    if lines := preflight.differences(nodes):
        raise UserError(f"the nodes differ: {'; '.join(lines)}")
    host.answer(None)
    return token.name


def _job_here(settings: Settings, decision: dict[str, Any]) -> tuple[Job | None, str | None]:
    """(the job as this node makes it, why it cannot take part)."""
    try:
        job = make_job(settings, find_base_model(settings))
    except UserError as error:
        return None, str(error)
    if not (job.folder / decision["token"]).exists():
        where = f"{job.folder.resolve()} is not the folder that node 0 calls {decision['folder']}"
        return job, f"{where}: put --save_checkpoint_dir on storage that all nodes share"
    return job, None


def _run_watched(meeting: Host | Guest, job: Job, run: Run, attempt: str) -> int:
    """The run on this node; it ends when another node is lost, and the others hear when this one fails."""
    settings, end = job.settings, processes.End()
    place = processes.Place(
        per_node=_per_node(job),
        nodes=settings.machine.nodes,
        node=settings.machine.rank,
        address=settings.machine.addr,
        port=settings.machine.port + 1,
        attempt=attempt,
    )
    with meeting.watching(end.because):
        code = run(job, place, end)
        if code == processes.EXIT_FAILED and end.reason is None:
            meeting.farewell(f"node {settings.machine.rank} failed: see what it says there")
    return code


def _per_node(job: Job | None) -> int:
    return 0 if job is None else job.layout.world // job.settings.machine.nodes


def facts_to_compare(job: Job | None, settings: Settings) -> dict[str, str]:
    """What has to be the same on all nodes. `settings` are those that this node was given."""
    facts: dict[str, str] = {name: version for name, version in versions().items() if name in _COMPARED}
    if job is None:
        return facts
    shared = {name: value for name, value in settings.as_json().items() if name not in _OWN}
    facts |= {"settings": _digest({**shared, "iters": job.iterations}), "data": job.reader.manifest.fingerprint()[:16]}
    facts |= {"validation data": "none" if job.validation is None else job.validation.manifest.fingerprint()[:16]}
    return facts | {"base model": job.base.fingerprint[:16], "layout": str(job.layout)}


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _leave_token(folder: Path) -> Path:
    """A file that other nodes look for: do they see this folder?"""
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / f".meeting-{secrets.token_hex(8)}"
    token.touch()
    return token


def workers_flags(argv: Sequence[str], job: Job) -> list[str]:
    """What the workers are started with: as typed, and what was decided since. Of a flag that is there twice, the last
    one counts.
    """
    flags = [*argv, "--iters", str(job.iterations)] if job.settings.schedule.iters is not None else list(argv)
    flags += [
        "--nodes",
        str(job.settings.machine.nodes),
        "--rank",
        str(job.settings.machine.rank),
        "--global_batch",
        str(job.settings.schedule.global_batch),
    ]
    flags += [word for name in ("tp", "pp") if (size := job.settings.value(name)) for word in (f"--{name}", str(size))]
    return flags if job.settings.data.val_datasets else [*flags, "--val", *job.settings.data.val]
