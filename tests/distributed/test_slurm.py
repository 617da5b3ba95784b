"""`sbatch launch/slurm.sbatch` on a real SLURM: two nodes, a signal before the time limit, queued again, resumed,
finished.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed import cluster
from tests.distributed.site import make_site

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cluster.is_possible() is not None, reason=str(cluster.is_possible())),
]

_SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "slurm.sbatch"
_RUN = [
    "--checkpoint",
    "base",
    "--run_name",
    "orders",
    "--data",
    "train.jsonl",
    "--global_batch",
    "12",
    "--lr",
    "1e-3",
    "--seq",
    "256",
]


@pytest.mark.timeout(3600)
def test_a_job_is_signalled_queued_again_and_finished(tmp_path: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "cluster").mkdir()
    site = make_site(tmp_path / "site", smollm2)
    monkeypatch.chdir(site.root)
    with cluster.cluster(tmp_path / "cluster") as slurm:
        for name, value in site.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PATH", f"{slurm.root / 'bin'}:{site.environment()['PATH']}")
        size = ["--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=3000", "--time=20"]
        said = slurm.run("sbatch", *size, str(_SCRIPT), *_RUN, "--iters", "240", "--nproc_per_node", "2", "--tp", "2")
        job = said.split()[-1]
        run = site.root / "checkpoints" / "llama-base-orders-seq256"
        _until(lambda: (run / "metrics.jsonl").exists() and len(site.metrics(run.name)) > 5, 120)
        slurm.run("scancel", "--batch", "--signal=USR1", job)
        _until(lambda: site.status(run.name)["state"] == "preempted", 60)
        saved = site.status(run.name)["iteration"]
        assert (run / f"step-{saved:07d}").is_dir()
        _until(lambda: len(site.metrics(run.name)) > saved + 20, 300)
        slurm.run("scontrol", "requeue", job)  # as a cluster does that wants its nodes back
        _until(lambda: (run / "hf").is_dir(), 400)
        _until(lambda: job not in slurm.queue(), 60)
    assert [record["iteration"] for record in site.metrics(run.name)] == list(range(1, 241))
    output = next(site.root.glob("slurm-*.out")).read_text()
    assert "saved after a signal: queueing the job again" in output
    resumed = [int(number) for number in re.findall(r"resumed after iteration (\d+)", output)]
    assert resumed[0] == saved
    assert resumed[-1] > saved + 20


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.25)
