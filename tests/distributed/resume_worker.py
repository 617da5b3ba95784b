"""What each process of a resume test runs: cases that train and save on the way, and cases that go on from what another
case saved.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sft.checkpoint.commit import find_latest, peers_of
from sft.checkpoint.fragments import Checkpoint
from sft.checkpoint.resume import restore, save, snapshot, start_saving
from sft.engine.start import start_worker, stop_worker
from sft.launcher.rendezvous import connect
from sft.optimizer import states
from tests.distributed import plain
from tests.distributed.worker import Run, prepare, reuse_groups

ITERATIONS, SAVED_AFTER = 8, 4
PATIENCE_SECONDS = 1200  # for a case that processes of another world save


def saved(root: Path, name: str, iteration: int = SAVED_AFTER) -> Path:
    folder = root / name if iteration == SAVED_AFTER else root / f"{name}-end"
    return folder / f"step-{iteration:07d}"


def run_case(case: dict[str, Any], device: torch.device, root: Path) -> dict[str, Any]:
    """{losses and gradient norms; names of what is not bit by bit as without interruption}. Leaves a checkpoint of the
    last iteration.
    """
    run = prepare(case, device)
    if case.get("resume"):
        result = _go_on(run, case, root)
    elif case.get("unsaved"):
        result = {"losses": _train(run, 0, ITERATIONS)}
    else:
        result = _save_on_the_way(run, root / case["name"])
        torch.save(_everything(run), root / f"{case['name']}-{dist.get_rank()}.pt")
    save(run.pipeline, saved(root, case["name"], ITERATIONS).parent, iteration=ITERATIONS, facts={}, peers=peers_of())
    return result


def _save_on_the_way(run: Run, folder: Path) -> dict[str, Any]:
    """As a run does it: training goes on while a thread writes, in files of which each rank has several."""
    first = _train(run, 0, SAVED_AFTER)
    pending = start_saving(
        snapshot(run.pipeline),
        folder,
        iteration=SAVED_AFTER,
        facts={"next": "ab"},
        peers=peers_of(),
        limit_bytes=20_000,
    )
    rest = []
    for number in range(SAVED_AFTER, ITERATIONS):
        rest += _train(run, number, number + 1)
        pending.poll()
    assert pending.finish() == saved(folder.parent, folder.name)
    found, skipped = find_latest(folder, peers=peers_of())
    assert found is not None
    assert (found.iteration, found.manifest["facts"], skipped) == (SAVED_AFTER, {"next": "ab"}, [])
    return {"losses": first + rest}


def _go_on(run: Run, case: dict[str, Any], root: Path) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not saved(root, case["resume"], ITERATIONS).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    for piece in states.pieces(run.pipeline.optimizer):
        numbers = piece.numbers().fill_(7.0)  # to be overwritten, all of it
        if not isinstance(piece.live, torch.Tensor):
            piece.live.put(numbers)
    start = restore(run.pipeline, Checkpoint(saved(root, case["resume"])), peers_of())
    result: dict[str, Any] = {"losses": _train(run, start, ITERATIONS)}
    if case.get("same"):
        kept, now = torch.load(root / f"{case['resume']}-{dist.get_rank()}.pt"), _everything(run)
        result["differ"] = [name for name in kept.keys() | now.keys() if not torch.equal(kept[name], now[name])]
    return result


def _everything(run: Run) -> dict[str, torch.Tensor]:
    """What the model computes with, and what the optimizer knows, in this process."""
    found = {f"{piece.name}|{piece.state}": piece.numbers().clone() for piece in states.pieces(run.pipeline.optimizer)}
    return found | run.weights() | {"step": torch.tensor(run.pipeline.optimizer.num_steps)}


def _train(run: Run, start: int, iterations: int) -> list[list[float]]:
    from sft.engine.trainer import train

    records = train(
        run.pipeline, run.feed, run.sampler, run.reader, rate=lambda k: plain.LR / k, start=start, iterations=iterations
    )
    return [[record["loss"], record["grad_norm"]] for record in records]


def main(cases_file: str, root: str) -> None:
    device = start_worker(connect(PATIENCE_SECONDS), timeout_seconds=PATIENCE_SECONDS)
    reuse_groups()
    for case in json.loads(Path(cases_file).read_text()):
        result = run_case(case, device, Path(root))
        (Path(root) / f"{case['name']}-{dist.get_rank()}.json").write_text(json.dumps(result))
    stop_worker()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
