"""Several nodes: the same command on each, with its own --rank. Node 0 tokenises and asks; all compare what they have, then start."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sft.config.train import TrainConfig
from sft.job import processes
from sft.job.base import find_base_model
from sft.job.meeting import Guest, Host, Ready, differences, say_on_stderr, table
from sft.job.prepare import Job, config_values, make_job, versions
from tokenize_data.errors import UserError

_OWN = (
    "rank",
    "addr",
    "data",
    "val",
    "tokenized_data_dir",
    "checkpoint",
    "checkpoints_file",
    "save_checkpoint_dir",
    "no_autoaccept_iters",
    "retokenize",
)
_COMPARED = ("sft", "torch", "deepspeed", "transformers")
Decide = Callable[[TrainConfig], Job | int]
Run = Callable[[Job, processes.Place, processes.End], int]


def run_first(config: TrainConfig, decide: Decide, run: Run) -> int:
    """Node 0. `decide` prepares and asks; an exit code from it is the end on all nodes."""
    host = Host(config.addr, config.port, config.nodes, say_on_stderr)
    stop: str | None = "node 0 was interrupted"
    try:
        decided = decide(config)
        if isinstance(decided, int):
            stop = "node 0 has ended before the start: see what it says there"
            return decided
        job = decided
        token = _leave_token(job.folder)
        decision = {"iters": job.iterations, "folder": str(job.folder.resolve()), "token": token.name}
        nodes = host.gather(decision, _ready(job, None, config), config.node_timeout)
        token.unlink(missing_ok=True)
        for line in table(nodes):
            say_on_stderr(line)
        if lines := differences(nodes):
            stop = f"the nodes differ: {'; '.join(lines)}"
            raise UserError(stop)
        stop = None
    except UserError as error:
        stop = str(error)
        raise
    finally:
        if stop is not None:
            host.answer(stop)
            host.close()
    host.answer(None)
    return _run_watched(host, job, run)


def run_guest(config: TrainConfig, run: Run) -> int:
    """Another node."""
    guest = Guest(config.addr, config.port, config.rank, config.node_timeout, say_on_stderr)
    decision = guest.decision(config.node_timeout, say_on_stderr)
    config = replace(config, iters=int(decision["iters"]))
    job, error = None, None
    try:
        job = make_job(config, find_base_model(config))
        if not (job.folder / decision["token"]).exists():
            error = (
                f"{job.folder.resolve()} is not the folder that node 0 calls {decision['folder']}: "
                "put --save_checkpoint_dir on storage that all nodes share"
            )
    except UserError as caught:
        error = str(caught)
    guest.say_ready(_ready(job, error, config), config.node_timeout)
    if job is None or error is not None:
        raise UserError(error or "this node cannot take part")
    return _run_watched(guest, job, run)


def _run_watched(meeting: Host | Guest, job: Job, run: Run) -> int:
    """The run on this node; it ends when another node is lost, and the others hear when this one fails."""
    config, end = job.config, processes.End()
    place = processes.Place(
        per_node=job.layout.world // config.nodes, nodes=config.nodes, node=config.rank, address=config.addr, port=config.port + 1
    )  # fmt: skip
    with meeting.watching(end.because):
        code = run(job, place, end)
        if code == processes.EXIT_FAILED and end.reason is None:
            meeting.farewell(f"node {config.rank} failed: see what it says there")
    return code


def _ready(job: Job | None, error: str | None, config: TrainConfig) -> Ready:
    facts: dict[str, str] = {name: version for name, version in versions().items() if name in _COMPARED}
    processes_here = 0
    if job is not None:
        settings = {name: value for name, value in config_values(config).items() if name not in _OWN}
        facts |= {"settings": _digest({**settings, "iters": job.iterations}), "data": job.reader.manifest.fingerprint()[:16]}
        facts |= {"base model": job.base.fingerprint[:16], "layout": str(job.layout)}
        processes_here = job.layout.world // config.nodes
    return Ready.of_this_node(config.rank, processes_here, facts, error, config.save_checkpoint_dir)


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _leave_token(folder: Path) -> Path:
    """A file that other nodes look for: do they see this folder?"""
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / f".meeting-{secrets.token_hex(8)}"
    token.touch()
    return token


def workers_flags(argv: Sequence[str], job: Job) -> list[str]:
    """What the workers are started with: as typed, and what was decided since."""
    return [*argv, "--iters", str(job.iterations)] if job.config.iters is not None else list(argv)
