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
from dataclasses import replace
from pathlib import Path
from typing import Any

from sft.config.train import TrainConfig
from sft.launcher import preflight, processes
from sft.launcher.meeting import Guest, Host, say_on_stderr
from sft.resolve.base import find_base_model
from sft.resolve.prepare import Job, config_values, make_job, versions
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
Decide = Callable[[TrainConfig], Job | int]
Run = Callable[[Job, processes.Place, processes.End], int]


def run_first(config: TrainConfig, decide: Decide, run: Run) -> int:
    """Node 0. `decide` prepares and asks; an exit code from it is the end on all nodes."""
    host = Host(config.addr, config.port, config.nodes, config.run_name, say_on_stderr)
    stop: str | None = "node 0 was interrupted"
    try:
        decided = decide(config)
        if isinstance(decided, int):
            stop = "node 0 has ended before the start: see what it says there"
            return decided
        _await_all(host, config)
        for restarts_left in range(config.max_restarts, -1, -1):
            job, chosen = _of_those_who_came(host, decided)
            attempt = _start_together(host, config, job, chosen, restarts_left)
            code = _run_watched(host, job, run, attempt)
            if code != processes.EXIT_FAILED or not restarts_left:
                stop = None
                return code
            say_on_stderr(
                f"another attempt from the latest checkpoint ({restarts_left} left): waiting for all "
                f"{config.nodes} nodes"
            )
            host.collect(config.replace_timeout)
    except UserError as error:
        stop = str(error)
        raise
    finally:
        if stop is not None:
            host.answer(stop)
        host.close()
    raise AssertionError("the last attempt returns")


def run_guest(config: TrainConfig, run: Run) -> int:
    """Another node."""
    patience, is_first = config.node_timeout, True
    while True:
        try:
            guest = Guest(config.addr, config.port, config.rank, config.run_name, patience, say_on_stderr)
            decision = guest.decision(patience, say_on_stderr)
        except UserError as error:
            if is_first:
                raise
            sys.stderr.write(f"sft train: no other attempt: {error}\n")
            return processes.EXIT_FAILED
        mine = _as_decided(config, decision)
        job, error_here = _job_here(mine, decision)
        folder = job.folder if job is not None else Path(config.save_checkpoint_dir)
        guest.say_ready(
            preflight.ready(mine.rank, _per_node(job), facts_to_compare(job, config), error_here, folder),
            config.node_timeout,
        )
        if job is None or error_here is not None:
            raise UserError(error_here or "this node cannot take part")
        code = _run_watched(guest, job, run, decision["token"])
        if code != processes.EXIT_FAILED or not decision["restarts_left"]:
            return code
        say_on_stderr("this attempt has ended: back to node 0 for the next one")
        patience, is_first = config.replace_timeout + 60.0, False


def _as_decided(config: TrainConfig, decision: dict[str, Any]) -> TrainConfig:
    """Whether there is validation is node 0's to say: it has made the shards, and names of files may be missing
    here.
    """
    iters, nodes, rank = (decision[name] for name in ("iters", "nodes", "rank"))
    config = replace(config, iters=iters, nodes=nodes, rank=rank, max_restarts=0, **decision["batch"])
    if config.has_validation == decision["has_validation"]:
        return config
    return replace(config, val=("as node 0",) if decision["has_validation"] else (), val_datasets=())


def _await_all(host: Host, config: TrainConfig) -> None:
    here = host.collect(config.node_timeout)
    missing = [node for node in range(1, config.nodes) if node not in here]
    if missing:
        raise UserError(
            f"node {', '.join(map(str, missing))} did not come within {config.node_timeout:.0f} s: start the same "
            "command there with "
            f"--rank {missing[0]}, the same --addr and --port, and see that this host can be reached"
        )


def _of_those_who_came(host: Host, decided: Job) -> tuple[Job, list[int]]:
    """The job for as many of the nodes that are here as a layout takes, and their numbers."""
    config, here = decided.config, host.collect(0)
    refusal = ""
    for count in range(len(here) + 1, 0, -1):
        try:
            job = make_job(replace(config, nodes=count, max_restarts=0), decided.base)
        except UserError as error:
            refusal = refusal or str(error)
            continue
        if count < config.nodes:
            say_on_stderr(
                f"{len(here) + 1} of {config.nodes} nodes came within {config.replace_timeout:.0f} s: "
                f"going on with {count}: {job.layout} in place of {decided.layout}"
            )
        return job, here[: count - 1]
    raise UserError(
        f"{len(here) + 1} of {config.nodes} nodes came within {config.replace_timeout:.0f} s, too few: {refusal}"
    )


def _start_together(host: Host, config: TrainConfig, job: Job, chosen: Sequence[int], restarts_left: int) -> str:
    """Returns a name of this attempt that only its nodes know."""
    token = _leave_token(job.folder)
    decision = {
        "iters": job.iterations,
        "has_validation": config.has_validation,
        "batch": batch_values(job.config),
        "folder": str(job.folder.resolve()),
        "token": token.name,
        "restarts_left": restarts_left,
    }
    mine = preflight.ready(0, _per_node(job), facts_to_compare(job, config), None, job.folder)
    try:
        nodes = host.agree(decision, chosen, mine, config.node_timeout)
    finally:
        token.unlink(missing_ok=True)
    for line in preflight.table(nodes):
        say_on_stderr(line)
    if lines := preflight.differences(nodes):
        raise UserError(f"the nodes differ: {'; '.join(lines)}")
    host.answer(None)
    return token.name


def _job_here(config: TrainConfig, decision: dict[str, Any]) -> tuple[Job | None, str | None]:
    """(the job as this node makes it, why it cannot take part)."""
    try:
        job = make_job(config, find_base_model(config))
    except UserError as error:
        return None, str(error)
    if not (job.folder / decision["token"]).exists():
        where = f"{job.folder.resolve()} is not the folder that node 0 calls {decision['folder']}"
        return job, f"{where}: put --save_checkpoint_dir on storage that all nodes share"
    return job, None


def _run_watched(meeting: Host | Guest, job: Job, run: Run, attempt: str) -> int:
    """The run on this node; it ends when another node is lost, and the others hear when this one fails."""
    config, end = job.config, processes.End()
    place = processes.Place(
        per_node=_per_node(job),
        nodes=config.nodes,
        node=config.rank,
        address=config.addr,
        port=config.port + 1,
        attempt=attempt,
    )
    with meeting.watching(end.because):
        code = run(job, place, end)
        if code == processes.EXIT_FAILED and end.reason is None:
            meeting.farewell(f"node {config.rank} failed: see what it says there")
    return code


def _per_node(job: Job | None) -> int:
    return 0 if job is None else job.layout.world // job.config.nodes


def facts_to_compare(job: Job | None, config: TrainConfig) -> dict[str, str]:
    """What has to be the same on all nodes. `config` is as this node was given it."""
    facts: dict[str, str] = {name: version for name, version in versions().items() if name in _COMPARED}
    if job is None:
        return facts
    settings = {name: value for name, value in config_values(config).items() if name not in _OWN}
    facts |= {
        "settings": _digest({**settings, "iters": job.iterations}),
        "data": job.reader.manifest.fingerprint()[:16],
    }
    facts |= {"validation data": "none" if job.validation is None else job.validation.manifest.fingerprint()[:16]}
    return facts | {"base model": job.base.fingerprint[:16], "layout": str(job.layout)}


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


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
    flags = [*argv, "--iters", str(job.iterations)] if job.config.iters is not None else list(argv)
    flags += [
        "--nodes",
        str(job.config.nodes),
        "--rank",
        str(job.config.rank),
        "--global_batch",
        str(job.config.global_batch),
    ]
    flags += [word for name in ("tp", "pp") if (size := getattr(job.config, name)) for word in (f"--{name}", str(size))]
    return flags if job.config.val_datasets else [*flags, "--val", *job.config.val]
