"""From the command to processes: tokenise, decide, show, ask, start. In a process that was started as a worker, only the last."""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from sft.config.train import TrainConfig
from sft.job.base import find_base_model
from sft.job.prepare import Job, facts_of, make_job, tokenise, visible_gpus
from sft.observe import run_folder
from sft.observe.header import header, iterations_text
from sft.observe.trackers import check_trackers
from tokenize_data.errors import UserError

EXIT_OK, EXIT_FINISHED, EXIT_FAILED = 0, 1, 3
_ERRORS = "SFT_ERRORS"  # a folder in which workers leave the reason why they stopped
_PREPARED = "SFT_PREPARED"  # set in workers whose launcher has tokenised and asked


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
        return EXIT_FINISHED
    facts = facts_of(job)
    header(Console(highlight=False), facts)
    if config.no_autoaccept_iters:
        accepted = _ask(iterations_text(facts), job.iterations)
        if accepted is None:
            return EXIT_OK
        config = replace(config, iters=accepted)
        argv = [*argv, "--iters", str(accepted)]
        job = replace(job, config=config, iterations=accepted)
    return _start(job, argv)


def _is_finished(job: Job) -> bool:
    if not run_folder.is_finished(job.folder):
        return False
    sys.stderr.write(f"sft train: this run is finished: its model is in {job.folder / 'hf'}; --id NAME repeats it from scratch\n")
    return True


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
        port = _free_port()
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return _work(job)
    return _start_processes(config, per_node, argv)


def _start_processes(config: TrainConfig, per_node: int, argv: Sequence[str]) -> int:
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it reports at length what a line says below
    endpoint = f"{config.addr}:{config.port}" if config.nodes > 1 else f"127.0.0.1:{_free_port()}"
    with tempfile.TemporaryDirectory(prefix="sft-") as errors:
        os.environ |= {_ERRORS: errors, _PREPARED: "1"}
        if not visible_gpus():
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // per_node)))
        launch = LaunchConfig(
            min_nodes=config.nodes, max_nodes=config.nodes, nproc_per_node=per_node, run_id=config.run_name, rdzv_backend="static",
            rdzv_endpoint=endpoint, rdzv_configs={"rank": config.rank, "timeout": 900}, max_restarts=0, monitor_interval=0.2,
        )  # fmt: skip
        try:
            elastic_launch(launch, sys.executable)("-m", "sft", "train", *argv)
        except ChildFailedError as error:
            return _told(Path(errors), [failure.exitcode for failure in error.failures.values()])
    return EXIT_OK


def _told(errors: Path, codes: Sequence[int]) -> int:
    """Say why the workers stopped: what the first of them left, or, where none could, how they ended."""
    left = [json.loads(file.read_text()) for file in sorted(errors.glob("*.json"))]
    if left:
        first = min(left, key=lambda entry: entry["time"])
        sys.stderr.write(f"sft train: {first['message']}\n")
        return int(first["code"])
    endings = ", ".join(f"signal {-code}" if code < 0 else f"exit code {code}" for code in codes)
    sys.stderr.write(f"sft train: a process of this run ended without a word ({endings}): out of memory, or killed from outside?\n")
    return EXIT_FAILED


def _run_as_worker(config: TrainConfig) -> int:
    base = find_base_model(config)
    if _PREPARED not in os.environ:
        if config.no_autoaccept_iters:
            raise UserError("--no_autoaccept_iters asks, and a worker cannot: give --iters")
        if os.environ["RANK"] == "0" and (code := tokenise(config, base)):
            return code
    job = make_job(config, base, world=int(os.environ["WORLD_SIZE"]))
    if _PREPARED not in os.environ and os.environ["RANK"] == "0":
        if _is_finished(job):
            return EXIT_FINISHED
        header(Console(highlight=False), facts_of(job))
    return _work(job)


def _work(job: Job) -> int:
    """Be a worker. What stops it becomes a line and an exit code."""
    import time

    worker: Any = importlib.import_module("sft.job.worker")
    watch: Any = importlib.import_module("sft.job.watch")
    try:
        worker.work(job)
    except Exception as error:
        code = 2 if isinstance(error, UserError) else EXIT_FAILED
        message = " ".join(watch.reason_of(error).splitlines())
        folder = os.environ.get(_ERRORS)
        if folder is None:
            sys.stderr.write(f"sft train: {message}\n")
        else:
            entry = {"code": code, "message": message, "time": time.time()}
            Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(entry))
        if os.environ.get("SFT_TRACEBACK"):
            raise
        sys.stdout.flush()
        os._exit(code) if int(os.environ["WORLD_SIZE"]) > 1 else None  # other threads may hang in a collective
        return code
    return EXIT_OK


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
