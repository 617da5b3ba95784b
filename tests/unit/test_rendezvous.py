"""The store where workers meet: whoever else connects to its port takes no part in the run."""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sft.launcher import processes
from sft.launcher.rendezvous import connect
from sft.spec.workers import ATTEMPT

LONG = 60.0
gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def worker(monkeypatch: pytest.MonkeyPatch, rank: int, port: int, attempt: str = "ours") -> Any:
    """The store as a worker of `attempt` sees it."""
    values = {
        "RANK": rank,
        "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        ATTEMPT: attempt,
    }
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    return connect(LONG)


def group(store: Any, rank: int) -> Any:
    return dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=LONG))


def total(rank_and_group: tuple[int, Any]) -> float:
    rank, members = rank_and_group
    number = torch.tensor([10.0**rank])
    members.allreduce([number]).wait()
    return float(number)


def ours_work(first: Any, second: Any) -> None:
    with ThreadPoolExecutor(2) as pool:
        groups = list(pool.map(group, (first, second), (0, 1)))
        assert list(pool.map(total, enumerate(groups))) == [11.0, 11.0]


@gloo
def test_a_worker_of_another_run_takes_no_part(monkeypatch: pytest.MonkeyPatch):
    """It has our port by mistake, connects as rank 1, and says where it can be found before ours does."""
    port = processes.free_port()
    first = worker(monkeypatch, 0, port)
    keys = first.num_keys()
    with ThreadPoolExecutor(1) as pool:
        lonely = pool.submit(group, worker(monkeypatch, 1, port, "theirs"), 1)
        while first.num_keys() < keys + 2:  # its address under its rank; the first key is torch's own
            time.sleep(0.01)
        ours_work(first, worker(monkeypatch, 1, port))
        assert not lonely.done()
        group(worker(monkeypatch, 1, port, "theirs"), 0)  # so that it ends, too
        lonely.result(LONG)


@gloo
@pytest.mark.parametrize("payload", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 64, b"\xff" * 4096, b'{"node": null}\n'])
def test_garbage_at_the_store_s_port(monkeypatch: pytest.MonkeyPatch, payload: bytes):
    port = processes.free_port()
    first = worker(monkeypatch, 0, port)
    held = socket.create_connection(("127.0.0.1", port))
    with held:
        held.sendall(payload)
        with socket.create_connection(("127.0.0.1", port)) as closed:
            closed.sendall(payload)
        ours_work(first, worker(monkeypatch, 1, port))


def test_each_start_has_a_name_that_nobody_else_knows(tmp_path, monkeypatch: pytest.MonkeyPatch):
    place = processes.NodeSlot(per_node=2)
    names = {processes._environment(place, tmp_path, None)[ATTEMPT] for _ in range(2)}
    assert len(names) == 2
    assert all(len(name) >= 16 for name in names)
    given = processes.NodeSlot(per_node=2, attempt="of node 0")
    assert processes._environment(given, tmp_path, None)[ATTEMPT] == "of node 0"
    assert ATTEMPT not in os.environ
