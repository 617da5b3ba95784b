"""A SLURM cluster of two nodes on this machine: controller, two node daemons and munge, in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "scancel", "squeue")
_CONFIG = """
ClusterName=sfttest
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.socket
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
ReturnToService=2
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmctldPort=17817
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmdSpoolDir={root}/spool-%n
StateSaveLocation={root}/state
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SchedulerType=sched/builtin
SelectType=select/cons_tres
JobRequeue=1
NodeName=sftn1 NodeHostname={host} NodeAddr=127.0.0.1 Port=17818 CPUs=1 RealMemory=4000
NodeName=sftn2 NodeHostname={host} NodeAddr=127.0.0.1 Port=17819 CPUs=1 RealMemory=4000
PartitionName=main Nodes=sftn1,sftn2 Default=YES MaxTime=INFINITE State=UP
"""
_HOSTS, _MARK = Path("/etc/hosts"), "# sft's test cluster"


@dataclass(frozen=True)
class Cluster:
    root: Path

    def run(self, *command: str) -> str:
        environment = {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf")}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    def queue(self) -> str:
        return self.run("squeue", "-h", "-o", "%i %T")


def is_possible() -> str | None:
    """None, or why not."""
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if missing:
        return f"SLURM is not installed ({', '.join(missing)}; Debian: slurm-wlm and munge)"
    return None if os.geteuid() == 0 else "a SLURM of our own needs root"


@contextlib.contextmanager
def cluster(root: Path) -> Iterator[Cluster]:
    for folder in ("run", "state"):
        (root / folder).mkdir()
    for folder in (root, *list(root.parents)[:-2]):
        folder.chmod(0o755)  # munge insists
    (root / "munge.key").write_bytes(os.urandom(1024))
    (root / "munge.key").chmod(0o400)
    (root / "slurm.conf").write_text(_CONFIG.format(host=socket.gethostname().split(".")[0], root=root))
    (root / "bin").mkdir()
    (root / "bin" / "sft").write_text(f'#!/bin/sh\nexec {sys.executable} -m sft "$@"\n')
    (root / "bin" / "sft").chmod(0o755)
    made, hosts = Cluster(root), _HOSTS.read_text()
    _HOSTS.write_text(f"{hosts.rstrip()}\n127.0.0.1 sftn1 sftn2 {_MARK}\n")
    try:
        munge = [
            "--key-file",
            "munge.key",
            "--socket",
            "run/munge.socket",
            "--pid-file",
            "run/munged.pid",
            "--log-file",
            "munged.log",
        ]
        munge = [str(root / word) if not word.startswith("--") else word for word in munge]
        made.run("munged", "--force", *munge, "--seed-file", str(root / "run" / "seed"))
        made.run("slurmctld", "-f", str(root / "slurm.conf"))
        for node in ("sftn1", "sftn2"):
            made.run("slurmd", "-f", str(root / "slurm.conf"), "-N", node)
        _wait_for_nodes(made)
        yield made
    finally:
        _HOSTS.write_text(hosts)
        for file in (root / "run").glob("*.pid"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(file.read_text()), signal.SIGTERM)


def _wait_for_nodes(made: Cluster) -> None:
    for _ in range(600):
        if made.run("sinfo", "-h", "-o", "%D %t").strip() == "2 idle":
            return
        time.sleep(0.5)
    raise RuntimeError(made.run("sinfo"))
