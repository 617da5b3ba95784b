"""Hosts, as network namespaces: the same losses as on one, and a message that names the host when something is not
right.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import hosts
from tests.distributed.site import Site, make_site
from tests.faults.points import Fault, environment, wait_for
from tests.faults.waiting import HANG_SECONDS, until

pytestmark = pytest.mark.skipif(hosts.are_possible() is not None, reason=str(hosts.are_possible()))

_FLAGS = ["--checkpoint", "base", "--run_name", "orders", "--global_batch", "12", "--lr", "1e-3", "--seq", "256"]
_DATA = ["--data", "train.jsonl", "--val", "val.jsonl"]
_RUN = "llama-base-orders-seq256"


def _slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Site:
    site = make_site(tmp_path_factory.mktemp("nodes"), smollm2)
    done = site.train("--iters", 4)
    assert done.returncode == 0, done.stderr
    return site


@pytest.fixture(scope="module")
def network() -> Iterator[list[str]]:
    with hosts.hosts(4) as names:
        yield names


@pytest.fixture
def node(site: Site, network: list[str], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start `sft` on a host. What it says goes to files."""
    started, folder = [], tmp_path

    def start(
        number: int, *flags: str, private: Path | None = None, address: str | None = None, env: dict | None = None
    ) -> subprocess.Popen:
        command = [sys.executable, "-m", "sft", *_FLAGS, "--addr", address or hosts.address(0)]
        command += ["--nodes", "2", "--rank", str(number), *flags]  # of a flag that is there twice, the last one counts
        whole = hosts.command_on(network[number], command, private)
        said = [folder / f"{len(started)}.{stream}" for stream in ("out", "err")]
        with said[0].open("w") as out, said[1].open("w") as err:
            process = subprocess.Popen(
                whole, cwd=site.root, env=site.environment(env), start_new_session=True, stdout=out, stderr=err
            )
        process.said = said
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ended(processes: Sequence[subprocess.Popen]) -> list[tuple[int, str, str]]:
    return [(process.wait(HANG_SECONDS), *(file.read_text() for file in process.said)) for process in processes]


def _until_said(process: subprocess.Popen, text: str) -> None:
    """On its standard error."""
    assert until(lambda: text in process.said[1].read_text() or process.poll() is not None)
    assert text in process.said[1].read_text()


def _until_listening(process: subprocess.Popen, port: int) -> None:
    table = Path(f"/proc/{process.pid}/net/tcp")  # of the host that it is on
    until(lambda: process.poll() is not None or f":{port:04X} 00000000:0000 0A" in table.read_text())
    assert process.poll() is None


def test_two_hosts_train_as_one_does(site: Site, node: Callable):
    flags = [*_DATA, "--iters", "4", "--id", "two", "--tp", "2", "--nproc_per_node", "2"]
    second = node(1, *flags)  # it comes first, and waits
    _until_said(second, "waiting for node 0 at ")
    (code, out, err), (other_code, other_out, other_err) = _ended([node(0, *flags), second])
    assert (code, other_code) == (0, 0), err + other_err
    assert "node 1 has connected: sfthost1" in err
    assert "4 processes = tp 2 x pp 1 x dp 2" in out
    assert "waiting for node 0 at 10.77.0.1:6020" in other_err
    assert "waiting until it has prepared the data" in other_err
    assert other_out == ""
    assert "2 nodes of 2, tensor groups inside a node, 2 replicas" in out
    table = [line.removeprefix("sft train: ") for line in err.splitlines()]
    columns = next(line for line in table if line.startswith("node  host"))
    assert columns.split("  ")[:2] == ["node", "host"]
    assert all(word in columns for word in ("processes", "devices", "free memory", "free disk", "clock"))
    assert any(line.startswith("1     sfthost1  2          ") and line.endswith(" s") for line in table)
    common = next(line for line in table if line.startswith("the same on all: "))
    assert all(
        word in common
        for word in ("sft 0.1.0", "torch 2", "deepspeed 0", "transformers 5", "settings ", "data ", "base model ")
    )
    for one, two in zip(site.metrics(_RUN), site.metrics(f"{_RUN}-two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "1", "--lr", "1e-4"], "node 1 (sfthost1) has settings "),
        (["--rank", "1", "--tokenized_data_dir", "elsewhere"], "node 1 (sfthost1): elsewhere/orders does not exist"),
        _slow(["--rank", "1", "--save_checkpoint_dir", "local"], "is not the folder that node 0 calls "),
        _slow(
            ["--rank", "1", "--checkpoint", "./missing"], "node 1 (sfthost1): --checkpoint ./missing: no such folder"
        ),
    ],
)
def test_what_differs_stops_all_with_the_host_s_name(site: Site, node: Callable, flags: list[str], message: str):
    (code, _, err), (other_code, _, other_err) = _ended(
        [node(0, *_DATA, "--iters", "4", "--id", "x"), node(1, "--iters", "4", "--id", "x", *flags)]
    )
    assert (code, other_code) == (2, 2), err + other_err
    assert message in err
    assert "sfthost1" in err
    assert "Traceback" not in err + other_err


def test_what_only_one_host_has(site: Site, node: Callable):
    """Other shards where they should be shared, another version of a library, a folder that cannot be written to."""
    fake = site.root / "fake"
    (fake / "transformers-4.99.dist-info").mkdir(parents=True)
    (fake / "transformers-4.99.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: transformers\nVersion: 4.99\n"
    )
    environment = {"PYTHONPATH": f"{fake}:{site.environment()['PYTHONPATH']}"}
    flags = ["--iters", "4", "--id", "only"]
    (code, _, err), (other_code, _, other_err) = _ended([node(0, *_DATA, *flags), node(1, *flags, env=environment)])
    assert (code, other_code) == (2, 2), err + other_err
    assert "node 1 (sfthost1) has transformers 4.99, node 0 (sfthost0) 5." in err
    hidden = site.root / "tokenized"
    (code, _, err), (other_code, _, other_err) = _ended([node(0, *_DATA, *flags), node(1, *flags, private=hidden)])
    assert (code, other_code) == (2, 2), err + other_err
    assert "node 1 (sfthost1): tokenized/orders does not exist" in err
    assert "tokenized/orders does not exist" in other_err


@pytest.mark.slow
def test_four_hosts_one_of_them_late(site: Site, node: Callable):
    flags = ["--iters", "4", "--id", "four", "--tp", "2", "--pp", "2", "--nodes", "4"]
    some = [node(0, *_DATA, *flags), node(1, *flags), node(2, *flags)]
    _until_said(some[0], "waiting for node 3")
    late = node(3, *flags)
    (code, out, err), *others = _ended([*some, late])
    assert [code, *(other[0] for other in others)] == [0, 0, 0, 0], err + "".join(other[2] for other in others)
    assert "waiting for node 3" in err
    assert "node 3 has connected: sfthost3" in err
    assert "4 nodes of 1, tensor groups over up to 2 nodes" in out
    assert "warning: --tp 2 does not fit into nodes of 1 processes" in err
    for one, four in zip(site.metrics(_RUN), site.metrics(f"{_RUN}-four"), strict=True):
        assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("end", ["replaced", _slow("fewer")])
def test_after_a_loss_the_run_goes_on(site: Site, node: Callable, tmp_path: Path, end: str):
    """With a replacement that comes in time; without one, with half the replicas."""
    flags = ["--iters", "40", "--id", end, "--save_interval", "5", "--max_restarts", "2"]
    flags += ["--replace_timeout", "1200" if end == "replaced" else "4", "--hang_timeout", "3600"]
    fault = Fault("iteration:8", tmp_path / "gate", "rank 1")
    first, second = node(0, *_DATA, *flags), node(1, *flags, env=environment(fault))
    assert wait_for(fault, first)
    os.killpg(second.pid, signal.SIGKILL)
    if end == "replaced":
        second = node(1, *flags)
    code, out, err = _ended([first])[0]
    assert code == 0, err
    assert "restarting from the latest checkpoint (2 restarts left): waiting for all 2 nodes" in err
    assert "resumed after iteration " in out
    if end == "replaced":
        assert _ended([second])[0][0] == 0
        assert err.count("node 1 has connected: sfthost1") == 2
    else:
        assert (
            "1 of 2 nodes connected within 4 s: continuing with 1: tp 1 x pp 1 x dp 1 instead of tp 1 x pp 1 x dp 2"
            in err
        )
    assert [record["iteration"] for record in site.metrics(f"{_RUN}-{end}")] == list(range(1, 41))


@pytest.mark.slow
def test_a_hostfile_starts_all_over_ssh(site: Site, network: list[str]):
    """With a real ssh where there is a server; SIGTERM reaches all nodes."""
    reason = hosts.ssh_is_possible()
    if reason is not None:
        pytest.skip(reason)
    with hosts.ssh_servers(network[:2], site.root / "ssh") as keys:
        (site.root / "hosts").write_text(f"# two\n{hosts.address(0)} slots=1\n{hosts.address(1)} slots=1\n")
        command = [
            sys.executable,
            "-m",
            "sft",
            *_FLAGS,
            *_DATA,
            "--hostfile",
            "hosts",
            "--id",
            "ssh",
            "--iters",
            "1000000",
        ]
        process = subprocess.Popen(
            hosts.command_on(network[0], command),
            cwd=site.root,
            env=site.environment(keys),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _until_iteration(site, f"{_RUN}-ssh", 5)
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=HANG_SECONDS)
            code = process.returncode
        finally:
            process.kill()
    assert code == 75, out + err
    assert "2 processes = tp 1 x pp 1 x dp 2" in out
    assert f"{hosts.address(1)}: sft train: connected to node 0 at {hosts.address(0)}:6020" in err
    assert site.status(f"{_RUN}-ssh")["state"] == "preempted"


@pytest.mark.slow
def test_the_same_rank_twice(site: Site, node: Callable):
    first = node(0, *_DATA, "--iters", "4", "--id", "rank", "--node_timeout", "6")
    (code, _, err), (other_code, _, other_err) = _ended(
        [first, node(1, "--iters", "4", "--id", "rank", "--rank", "0", "--port", "6030")]
    )
    assert code == 2
    assert "node 1 did not connect within 6 s: start the same command there with --rank 1" in err
    assert other_code == 2
    assert "node 0 cannot listen on 10.77.0.1:6030" in other_err


def test_a_wrong_address_and_a_port_in_use(site: Site, node: Callable):
    ((code, _, err),) = _ended([node(1, "--iters", "4", "--node_timeout", "2", address="10.77.0.9")])
    assert code == 2
    assert "node 0 at 10.77.0.9:6020 did not answer within 2 s" in err
    first = node(0, *_DATA, "--iters", "4", "--id", "port")
    _until_listening(first, 6020)
    ((code, _, err),) = _ended([node(0, *_DATA, "--iters", "4", "--id", "port")])
    assert code == 2
    assert "node 0 cannot listen on 10.77.0.1:6020 (Address already in use)" in err
    first.terminate()


@pytest.mark.parametrize("fault", ["killed", _slow("cut")])
def test_a_lost_host_ends_the_run_on_the_other(site: Site, node: Callable, tmp_path: Path, fault: str):
    flags = ["--iters", "600", "--id", fault, "--hang_timeout", "3600"]
    moment = Fault("iteration:4", tmp_path / "gate", "rank 1")
    first, second = node(0, *_DATA, *flags), node(1, *flags, env=environment(moment))
    assert wait_for(moment, first)
    if fault == "killed":
        os.killpg(second.pid, signal.SIGKILL)
    else:
        hosts.cut(1)
    code, _, err = _ended([first])[0]
    assert code == 3, err
    assert "node 1 (sfthost1) " in err
    assert "run the same command to resume from the latest checkpoint" in err


def _until_iteration(site: Site, run: str, iteration: int) -> None:
    file = site.root / "checkpoints" / run / "metrics.jsonl"
    assert until(lambda: file.exists() and len(file.read_text().splitlines()) >= iteration), (
        f"{run} did not come to iteration {iteration}"
    )
