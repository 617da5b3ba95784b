"""`--hostfile F`: starts the same command on every host of a file over ssh, from any machine."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sft.config.settings import Settings
from sft.launcher.remote import SIGNALS_FROM_INPUT
from sft.spec.exit_codes import EXIT_FAILED, EXIT_FINISHED, EXIT_OK, EXIT_PREEMPTED, EXIT_USER_ERROR, as_exit_code
from sft.spec.workers import PASSED_ON
from tokenize_data.errors import UserError, shorten

_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15")
_SSH_FAILED, _POLL_SECONDS = 255, 0.1
_LINE = re.compile(r"(?P<host>[^\s\x00-\x1f\x7f]+)(\s+slots\s*=\s*(?P<slots>[0-9]{1,6}))?")
# Environment variables that processes need to find programs and each other. No secrets: all users of a host can see
# command lines.
_PASSED = (
    "NCCL_",
    "GLOO_",
    "UCX_",
    "FI_",
    "OMP_",
    "CUDA_",
    "TORCH_",
    "SFT_TRACEBACK",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
)
_PATHS = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")


@dataclass(frozen=True, kw_only=True)
class HostLine:
    """A line of the file: `user@host slots=8`."""

    host: str
    slots: int | None


def read_hostfile(path: Path) -> list[HostLine]:
    """Read a hostfile as DeepSpeed and MPI do: one host per line, `#` starts a comment."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--hostfile {path} cannot be read ({shorten(error, 80)}): it is text, a line for each host"
        ) from error
    hosts: list[HostLine] = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        found = _LINE.fullmatch(line)
        if found is None or found["host"].startswith("-"):
            raise UserError(f"{path} line {number}: {shorten(line, 60)} is not a host: write lines as node1 slots=8")
        if any(found["host"] == one.host for one in hosts):
            raise UserError(f"{path} line {number}: {found['host']} is listed twice: one line for each host")
        hosts.append(HostLine(host=found["host"], slots=int(found["slots"]) if found["slots"] else None))
    if not hosts:
        raise UserError(f"{path} names no host: write lines as node1 slots=8")
    if len({one.slots for one in hosts}) > 1:
        counts = ", ".join(f"{one.host} {one.slots or 'none'}" for one in hosts)
        raise UserError(
            f"{path} gives hosts different slots ({counts}): every node runs the same number of processes; "
            "give all hosts the same"
        )
    if hosts[0].slots == 0:
        raise UserError(f"{path}: slots=0 leaves no process: give the number of GPUs of a host")
    return hosts


def run(settings: Settings, argv: Sequence[str]) -> int:
    """Start every node, show their output, pass signals on. Returns node 0's exit code."""
    assert settings.machine.hostfile is not None
    if settings.machine.nodes != 1 or settings.machine.rank != 0:
        raise UserError("--hostfile starts all nodes itself: leave --nodes and --rank out")
    if settings.schedule.no_autoaccept_iters:
        raise UserError(
            "--no_autoaccept_iters asks for confirmation, but with --hostfile there is no terminal: give --iters"
        )
    hosts = read_hostfile(Path(settings.machine.hostfile))
    address = settings.machine.addr if settings.machine.addr != "localhost" else hosts[0].host.rpartition("@")[2]
    nodes = [
        _Node(number, one, _remote_command(one, argv, number, len(hosts), address, settings.machine.nproc_per_node))
        for number, one in enumerate(hosts)
    ]

    def pass_on(number: int, frame: object) -> None:
        for node in nodes:
            node.send(signal.Signals(number).name)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        codes, unreached = _wait(nodes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if unreached is not None:
        what = f"ssh to {unreached} failed, or `sft` was killed there"
        sys.stderr.write(
            f"sft train: {what}: see that `ssh {unreached} true` works without a password, and read the output above\n"
        )
        return EXIT_FAILED
    code = next((code for code in codes if code), EXIT_OK)
    known = (EXIT_OK, EXIT_FINISHED, EXIT_USER_ERROR, EXIT_FAILED, EXIT_PREEMPTED)
    return as_exit_code("train", f"`sft` on {hosts[codes.index(code)].host}", code, known)


class _Node:
    """`sft` on one host. Signals travel through its standard input; if that closes because this process died, it saves
    and exits.
    """

    def __init__(self, number: int, line: HostLine, command: list[str]) -> None:
        self.host = line.host
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._process: subprocess.Popen[bytes] = subprocess.Popen(command, start_new_session=True, **pipes)  # type: ignore[call-overload]
        prefix = b"" if number == 0 else f"{line.host}: ".encode()
        streams = ((self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr))
        self._shown = [
            threading.Thread(target=_show, args=(source, target.buffer, prefix), daemon=True)
            for source, target in streams
        ]
        for thread in self._shown:
            thread.start()

    def send(self, word: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(f"{word}\n".encode())
            self._process.stdin.flush()

    def poll(self) -> int | None:
        """Its exit code once it has ended and all its output has been shown; None before."""
        code = self._process.poll()
        if code is not None:
            for thread in self._shown:
                thread.join(5)
            for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
        return code


def _wait(nodes: Sequence[_Node]) -> tuple[list[int], str | None]:
    """Returns (exit codes, an unreachable host or None). If a host is unreachable, the others are stopped, since they
    would wait for it.
    """
    codes: dict[int, int] = {}
    unreached: str | None = None
    while len(codes) < len(nodes):
        for number, node in enumerate(nodes):
            code = node.poll() if number not in codes else None
            if code is None:
                continue
            codes[number] = code
            if code == _SSH_FAILED and unreached is None:
                unreached = node.host
                for other in nodes:
                    other.send("SIGTERM")
        time.sleep(_POLL_SECONDS)
    return [codes[number] for number in range(len(nodes))], unreached


def _show(source: IO[bytes], target: IO[bytes], prefix: bytes) -> None:
    for line in source:
        target.write(prefix + line)
        target.flush()


def _remote_command(
    line: HostLine, argv: Sequence[str], number: int, nodes: int, address: str, given: int | None
) -> list[str]:
    flags = [*_without_hostfile(argv), "--nodes", str(nodes), "--rank", str(number), "--addr", address]
    if given is None and line.slots is not None:
        flags += ["--nproc_per_node", str(line.slots)]
    passed = {name: value for name, value in os.environ.items() if name in _PATHS or name.startswith(_PASSED)}
    program = [sys.executable, "-m", "sft", "train", *flags]
    settings = [f"{name}={value}" for name, value in sorted({**passed, SIGNALS_FROM_INPUT: "1"}.items())]
    return [*_SSH, line.host, f"cd {shlex.quote(os.getcwd())} && exec env {shlex.join(settings)} {shlex.join(program)}"]


def _without_hostfile(argv: Sequence[str]) -> list[str]:
    """The command line without `--hostfile F` or `--hostfile=F`."""
    kept: list[str] = []
    is_value = False
    for word in argv:
        if not is_value and word.partition("=")[0] != "--hostfile":
            kept.append(word)
        is_value = word == "--hostfile"
    return kept
