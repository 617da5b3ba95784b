"""`tokenize_data --engine ray`: what a cluster makes is what one machine makes, byte for byte. On a real cluster of two
workers.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import pair
from tests.unit.test_parts import KEPT, rows, shards, small_chunks  # noqa: F401 - a fixture
from tokenize_data import ray_pool
from tokenize_data.errors import FailedError, UserError
from tokenize_data.pool import ordered_map


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="pip install 'megasft[ray]'")
    ray_pool._import()
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(num_cpus=2, **quiet)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster", "small_chunks")
def test_the_same_bytes_as_on_one_machine(bench):
    bad = [{"prompt": "A question without an answer?"}]
    data = bench.jsonl([*rows(150), *bad, *rows(150, seed=1)])
    flags = ("--data", data, "--val", "10%", "--max_bad_rows", 3)
    assert bench.tokenize(*flags, "--workers", 1, run_name="one").code == 0
    outcome = bench.tokenize(*flags, "--engine", "ray", "--workers", 2)
    assert outcome.code == 0, outcome.err
    assert "Ray: 2 workers on the cluster of this program" in outcome.out, outcome.out
    for name in ("", "-val"):
        assert shards(bench, f"r{name}") == shards(bench, f"one{name}")
        one, many = bench.manifest(f"one{name}"), bench.manifest(f"r{name}")
        assert {key: many[key] for key in KEPT} == {key: one[key] for key in KEPT}
        rejected = [bench.tokenized / f"{run}{name}" / "rejected.jsonl" for run in ("one", "r")]
        assert len({file.exists() and file.read_bytes() for file in rejected}) == 1


@pytest.mark.usefixtures("cluster")
def test_a_bad_row_is_one_line(bench):
    outcome = bench.tokenize("--data", bench.jsonl([pair("A?", "B."), {"prompt": "A?"}]), "--engine", "ray")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "data.jsonl line 2: no key 'gold'" in outcome.err
    assert not (bench.tokenized / "r").exists()


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_is_lost_again_and_again(monkeypatch):
    monkeypatch.setattr(ray_pool, "_MOST_RESTARTS", 0)

    def dies(task: int) -> int:
        if task == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return task

    with pytest.raises(FailedError, match="a worker of Ray was lost 1 times: a node or its memory is gone, or the"):
        list(ray_pool.ordered_map(dies, range(5), 2, print))


@pytest.mark.usefixtures("cluster")
def test_a_lost_worker_is_replaced(tmp_path):
    def dies_once(task: int) -> int:
        mark = tmp_path / "died"
        if task == 5 and not mark.exists():
            mark.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return task * task

    assert list(ray_pool.ordered_map(dies_once, range(20), 2, print)) == [n * n for n in range(20)]


@pytest.mark.usefixtures("cluster")
def test_other_versions_are_named(monkeypatch):
    here = ray_pool._versions()
    monkeypatch.setattr(ray_pool, "_versions", lambda: {**here, "tokenizers": "0.0.1"})
    with pytest.raises(UserError, match=r"has tokenizers \S+, this machine has 0.0.1: install one version"):
        list(ray_pool.ordered_map(abs, range(5), 1, print))


def test_a_cluster_out_of_reach_is_named_at_once(bench, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(
        FailedError, match=r"Ray at 127.0.0.1:1 cannot be reached \(Connection refused\): check RAY_ADD"
    ):
        ray_pool._check_reachable("127.0.0.1:1")
    ray_pool._check_reachable("auto")
    ray_pool._check_reachable(None)


def test_without_ray_the_package_is_named(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    outcome = bench.tokenize("--data", bench.jsonl([pair("A?", "B.")]), "--engine", "ray")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "--engine ray needs Ray: pip install 'megasft[ray]', here and on all nodes" in outcome.err


def test_both_pools_answer_alike():
    assert list(ordered_map(abs, range(-9, 9), 2)) == [abs(n) for n in range(-9, 9)]
