"""Two hosts, as network namespaces: the same losses as on one, and a message that names the host when something is not right."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import hosts
from tests.distributed.site import Site, make_site

pytestmark = pytest.mark.skipif(hosts.are_possible() is not None, reason=str(hosts.are_possible()))

_FLAGS = ["--checkpoint", "base", "--run_name", "orders", "--global_batch", "12", "--lr", "1e-3", "--seq", "256", "--nodes", "2"]
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
    with hosts.hosts(2) as names:
        yield names


@pytest.fixture
def node(site: Site, network: list[str]) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start `sft` on a host."""
    started = []

    def start(
        number: int, *flags: str, private: Path | None = None, address: str | None = None, env: dict | None = None
    ) -> subprocess.Popen:
        command = [sys.executable, "-m", "sft", *_FLAGS, "--addr", address or hosts.address(0), *flags]
        command += [] if "--rank" in flags else ["--rank", str(number)]
        whole = hosts.command_on(network[number], command, private)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(whole, cwd=site.root, env=site.environment(env), start_new_session=True, **pipes)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _ended(processes: Sequence[subprocess.Popen], seconds: float = 120) -> list[tuple[int, str, str]]:
    deadline = time.monotonic() + seconds
    results = []
    for process in processes:
        out, err = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        results.append((process.returncode, out, err))
    return results


def test_two_hosts_train_as_one_does(site: Site, node: Callable):
    flags = [*_DATA, "--iters", "4", "--id", "two", "--tp", "2", "--nproc_per_node", "2"]
    second = node(1, *flags)  # it comes first, and waits
    time.sleep(1.5)
    (code, out, err), (other_code, other_out, other_err) = _ended([node(0, *flags), second])
    assert (code, other_code) == (0, 0), err + other_err
    assert "node 1 is here: sfthost1" in err
    assert "4 processes = tp 2 x pp 1 x dp 2" in out
    assert "waiting for node 0 at 10.77.0.1:6020" in other_err
    assert "waiting until it has prepared the data" in other_err
    assert other_out == ""
    for one, two in zip(site.metrics(_RUN), site.metrics(f"{_RUN}-two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "1", "--lr", "1e-4"], "node 1 (sfthost1) has settings "),
        (["--rank", "1", "--tokenized_data_dir", "elsewhere"], "node 1 (sfthost1): elsewhere/orders does not exist"),
        _slow(["--rank", "1", "--save_checkpoint_dir", "local"], "is not the folder that node 0 calls "),
        _slow(["--rank", "1", "--checkpoint", "./missing"], "node 1 (sfthost1): --checkpoint ./missing: no such folder"),
    ],
)  # fmt: skip
def test_what_differs_stops_all_with_the_host_s_name(site: Site, node: Callable, flags: list[str], message: str):
    (code, _, err), (other_code, _, other_err) = _ended(
        [node(0, *_DATA, "--iters", "4", "--id", "x"), node(1, "--iters", "4", "--id", "x", *flags)]
    )
    assert (code, other_code) == (2, 2), err + other_err
    assert message in err
    assert "sfthost1" in err
    assert "Traceback" not in err + other_err


@pytest.mark.slow
def test_the_same_rank_twice(site: Site, node: Callable):
    first = node(0, *_DATA, "--iters", "4", "--id", "rank", "--node_timeout", "6")
    (code, _, err), (other_code, _, other_err) = _ended([first, node(1, "--iters", "4", "--id", "rank", "--rank", "0", "--port", "6030")])
    assert code == 2
    assert "node 1 did not come within 6 s: start the same command there with --rank 1" in err
    assert other_code == 2
    assert "node 0 cannot listen on 10.77.0.1:6030" in other_err


def test_a_wrong_address_and_a_port_in_use(site: Site, node: Callable):
    ((code, _, err),) = _ended([node(1, "--iters", "4", "--node_timeout", "2", address="10.77.0.9")])
    assert code == 2
    assert "node 0 at 10.77.0.9:6020 did not answer within 2 s" in err
    first = node(0, *_DATA, "--iters", "4", "--id", "port", "--node_timeout", "8")
    time.sleep(1)
    ((code, _, err),) = _ended([node(0, *_DATA, "--iters", "4", "--id", "port")])
    assert code == 2
    assert "node 0 cannot listen on 10.77.0.1:6020 (Address already in use)" in err
    _ended([first])


@pytest.mark.parametrize("fault", ["killed", _slow("cut")])
def test_a_lost_host_ends_the_run_on_the_other(site: Site, node: Callable, fault: str):
    flags = ["--iters", "600", "--id", fault, "--hang_timeout", "60"]
    first, second = node(0, *_DATA, *flags), node(1, *flags)
    file = site.root / "checkpoints" / f"{_RUN}-{fault}" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (file.exists() and len(file.read_text().splitlines()) > 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    if fault == "killed":
        os.killpg(second.pid, signal.SIGKILL)
    else:
        hosts.cut(1)
    began = time.monotonic()
    code, _, err = _ended([first], 60)[0]
    assert code == 3, err
    assert "node 1 (sfthost1) " in err
    assert "the same command goes on from the latest checkpoint" in err
    assert time.monotonic() - began < (15 if fault == "killed" else 40)
