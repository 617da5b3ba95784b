"""What happens to a run from outside: signals, killed and stopped processes, a second run in the same folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sft.launcher import lease
from tests.distributed.site import Site, make_site
from tests.faults.points import Fault, environment, wait_for
from tests.faults.rows import is_alive, workers_of
from tests.faults.waiting import HANG_SECONDS, until
from tokenize_data.errors import UserError

_LONG = ["--iters", "400", "--save_interval", "1000", "--hang_timeout", "3600"]  # it is held on the way


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Site:
    site = make_site(tmp_path_factory.mktemp("faults"), smollm2)
    done = site.train("--iters", 1)
    assert done.returncode == 0, done.stderr
    return site


@pytest.fixture
def start(site: Site) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start a long run. Its processes wait after their third iteration, or do there what `action` says."""
    started = []

    def begin(name: str, *flags: str, action: str = "hold", who: str = "rank *") -> subprocess.Popen:
        fault = Fault("iteration:3", site.root / "gates" / f"{name}{len(started)}", who, action)
        command = [
            sys.executable,
            "-m",
            "sft",
            "--checkpoint",
            "base",
            "--run_name",
            "orders",
            "--global_batch",
            "12",
            "--lr",
            "1e-3",
        ]
        command += ["--seq", "256", "--id", name, *_LONG, *flags]
        process = subprocess.Popen(
            command,
            cwd=site.root,
            env=site.environment(environment(fault)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        process.let_go = fault.open
        started.append(process)
        processes = (
            int(flags[flags.index("--nproc_per_node") + 1]) if "--nproc_per_node" in flags and who == "rank *" else 1
        )
        assert wait_for(fault, process, by=processes), process.communicate()[1]
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_saves_and_asks_to_be_started_again(site: Site, start: Callable, processes: int):
    name = f"term{processes}"
    process = start(name, "--nproc_per_node", str(processes))
    process.send_signal(signal.SIGTERM if processes == 1 else signal.SIGUSR1)
    process.let_go()
    _, said = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 75, said
    status = site.status(_run(name))
    assert status["state"] == "preempted"
    assert (site.root / "checkpoints" / _run(name) / f"step-{status['iteration']:07d}").is_dir()
    assert f"stopped by a signal after iteration {status['iteration']}, which is saved" in said
    assert "run the same command to resume" in said
    again = site.train("--id", name, "--iters", status["iteration"] + 2)
    assert again.returncode == 0, again.stderr
    assert f"resumed after iteration {status['iteration']}" in again.stdout
    iterations = [record["iteration"] for record in _metrics(site, name)]
    assert iterations == list(range(1, len(iterations) + 1))


def test_no_other_host_can_reach_a_run_on_one_node(start: Callable):
    process = start("listening", "--nproc_per_node", "2")
    addresses = [address for pid in [process.pid, *workers_of(process.pid)] for address in _listening(pid)]
    assert addresses  # the first worker's, at which the others come
    assert {address.split(".")[0] for address in addresses} == {"127"}, addresses


def test_a_killed_process_ends_the_others(site: Site, start: Callable):
    process = start("killed", "--nproc_per_node", "2")
    workers = workers_of(process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    _, said = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 3
    assert "processes were killed: rank " in said
    assert "1 (SIGKILL)" in said
    assert said.count("\n") == 1
    assert not [pid for pid in workers if is_alive(pid)]


def test_a_stopped_process_ends_the_run_with_everyone_s_stack(site: Site, start: Callable):
    process = start("stopped", "--nproc_per_node", "2", "--hang_timeout", "8", action="stop", who="rank 1")
    _, said = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 3
    assert "no progress for " in said
    assert "where each process was: " in said
    stacks = {
        file.name: file.read_text() for file in (site.root / "checkpoints" / _run("stopped") / "stacks").iterdir()
    }
    assert stacks.keys() == {"rank-00000.txt", "rank-00001.txt"}
    assert all("most recent call first" in text for text in stacks.values())
    assert site.status(_run("stopped"))["state"] in ("failed", "running")


def test_workers_do_not_outlive_their_launcher(site: Site, start: Callable):
    process = start("orphans", "--nproc_per_node", "2")
    workers = workers_of(process.pid)
    process.kill()
    process.wait()
    assert until(lambda: not any(is_alive(pid) for pid in workers))


def test_a_second_run_in_the_same_folder_is_refused_and_a_dead_one_s_lease_taken_over(site: Site, start: Callable):
    process = start("twice")
    second = site.train("--iters", 400, "--id", "twice", "--save_interval", 1000)
    assert second.returncode == 2
    assert f"is being trained by process {process.pid} on " in second.stderr
    assert " s old: wait for it, stop it, or repeat the run beside it with --id NAME" in second.stderr
    process.kill()
    process.wait()
    assert (site.root / "checkpoints" / _run("twice") / lease.NAME).exists()
    start("twice")


def test_a_lease_of_another_host_counts_while_it_is_renewed(tmp_path: Path):
    file = tmp_path / lease.NAME
    content = {"host": "elsewhere", "boot": "x", "pid": 7, "started": "1", "renewed": time.time(), "token": "t"}
    file.write_text(json.dumps(content))
    with (
        pytest.raises(UserError, match=r"is being trained by process 7 on elsewhere, its lease is \d+ s old"),
        lease.held(tmp_path),
    ):
        pass
    os.utime(file, (time.time() - 3600, time.time() - 3600))
    with lease.held(tmp_path, watch_seconds=0.1):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert not file.exists()


def _run(name: str) -> str:
    return f"llama-base-orders-seq256-{name}"


def _metrics(site: Site, name: str) -> list[dict]:
    file = site.root / "checkpoints" / _run(name) / "metrics.jsonl"
    return site.metrics(_run(name)) if file.exists() else []


def _listening(pid: int) -> list[str]:
    """The addresses at which a process listens; those of IPv6 as they are in /proc."""
    links = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
    sockets = {link[8:-1] for link in links if link.startswith("socket:[")}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:  # 0A: it listens
                address = fields[1].split(":")[0]
                found.append(
                    ".".join(str(byte) for byte in reversed(bytes.fromhex(address))) if table == "tcp" else address
                )
    return found
