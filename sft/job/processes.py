"""Starting the processes of a command on this node, and turning the way they end into one line and an exit code."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import platform
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenize_data.errors import UserError

EXIT_OK, EXIT_FINISHED, EXIT_USER_ERROR, EXIT_FAILED = 0, 1, 2, 3
_ERRORS = "SFT_ERRORS"  # a folder in which workers leave the reason why they stopped
PREPARED = "SFT_PREPARED"  # set in workers whose launcher has tokenised and asked
TRACEBACK = "SFT_TRACEBACK"  # set by a person who wants more than a line


def be_alone() -> None:
    """Let this process be the only one of its run."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def start(
    command: str, argv: Sequence[str], *, per_node: int, nodes: int = 1, node: int = 0, endpoint: str | None = None, use_gpu: bool = False
) -> int:
    """Run `sft <command> <argv>` as `per_node` workers on this node, until all have ended."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it reports at length what a line says below
    with tempfile.TemporaryDirectory(prefix="sft-") as errors:
        os.environ |= {_ERRORS: errors, PREPARED: "1"}
        if not use_gpu:
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // per_node)))
        launch = LaunchConfig(
            min_nodes=nodes, max_nodes=nodes, nproc_per_node=per_node, run_id="sft", rdzv_backend="static",
            rdzv_endpoint=endpoint or f"127.0.0.1:{free_port()}", rdzv_configs={"rank": node, "timeout": 900}, max_restarts=0,
            monitor_interval=0.2,
        )  # fmt: skip
        try:
            elastic_launch(launch, sys.executable)("-m", "sft", command, *argv)
        except ChildFailedError as error:
            return _told(command, Path(errors), [failure.exitcode for failure in error.failures.values()])
    return EXIT_OK


def end_with_launcher() -> None:
    """In a worker of our launcher: be killed when that is killed. (Elastic workers have a session of their own, and would go on.)"""
    if _ERRORS not in os.environ or sys.platform != "linux":
        return
    set_parent_death_signal = 1  # prctl's PR_SET_PDEATHSIG
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() == 1:  # it was quicker
        os.kill(os.getpid(), signal.SIGKILL)


def guarded(command: str, work: Callable[[], int]) -> int:
    """Run `work` in a worker. What stops it is left for the launcher, or said, in one line."""
    end_with_launcher()
    try:
        return work()
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        code, message = _as_line(error)
        folder = os.environ.get(_ERRORS)
        if folder is None or not Path(folder).is_dir():
            sys.stderr.write(f"sft {command}: {message}\n")
        else:
            entry = {"code": code, "message": message, "time": time.time()}
            Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(entry))
        if int(os.environ["WORLD_SIZE"]) > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # other threads of this process may hang in an exchange with those that went on
        return code


def reason_of(error: BaseException) -> str:
    """What stopped a run, for a person."""
    if isinstance(error, UserError) or type(error).__name__ in ("TrainingError", "CheckpointError"):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return "out of GPU memory: use a smaller --micro_batch, --recompute full, or a larger --tp or --pp"
    where = f"{platform.node()}, process {os.getpid()}, rank {os.environ.get('RANK', '0')}"
    return f"{type(error).__name__} ({where}): {' '.join(str(error).split())[:500]}; {TRACEBACK}=1 shows where"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _as_line(error: BaseException) -> tuple[int, str]:
    is_given = isinstance(error, UserError) and type(error).__name__ != "CheckpointError"
    code = EXIT_USER_ERROR if is_given else EXIT_FAILED
    return code, " ".join(reason_of(error).splitlines())


def _told(command: str, errors: Path, codes: Sequence[int]) -> int:
    """Say why the workers stopped: what the first of them left, or, where none could, how they ended."""
    left = [json.loads(file.read_text()) for file in sorted(errors.glob("*.json"))]
    if left:
        first = min(left, key=lambda entry: (entry["code"] != EXIT_USER_ERROR, entry["time"]))
        sys.stderr.write(f"sft {command}: {first['message']}\n")
        return int(first["code"])
    endings = ", ".join(f"signal {-code}" if code < 0 else f"exit code {code}" for code in codes)
    sys.stderr.write(f"sft {command}: a process of this run ended without a word ({endings}): out of memory, or killed from outside?\n")
    return EXIT_FAILED
