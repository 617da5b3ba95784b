"""What each process of a resume test runs: cases that train, save after a while, or go on from what another case saved."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sft.engine.start import start_worker, stop_worker
from tests.distributed import plain
from tests.distributed.data import MemoryReader
from tests.models import tiny_config

ITERATIONS, SAVED_AFTER, GLOBAL_BATCH, DOCUMENTS, SEQ, SEED = 8, 4, 12, 40, 32, 7


class Case:
    """A pipeline of its own, with weights that do not matter where it resumes."""

    def __init__(self, case: dict[str, Any], device: torch.device) -> None:
        from sft.engine.feed import Feed
        from sft.engine.groups import form_groups
        from sft.engine.optimizers import OptimizerSettings
        from sft.engine.pipeline import Pipeline
        from sft.model.build import build_stage
        from sft.plan.layout import Layout
        from sft.plan.sampler import Sampler
        from sft.plan.stages import partition

        config = tiny_config(case["family"])
        dtype = torch.bfloat16 if case.get("bf16") else torch.float32
        layout = Layout(tp=case["tp"], pp=case["pp"], dp=case["dp"], sequence_parallel=case.get("sequence_parallel", False))
        processes = form_groups(layout)
        layers = partition([1.0] * config.num_hidden_layers, layout.pp)[processes.stage]
        self.built = build_stage(
            config, layers, processes.tensor, sequence_parallel=layout.sequence_parallel, recompute="none", dtype=dtype, device=device
        )  # fmt: skip
        whole = dict(plain.make_model(config, seed=1 if case.get("resume") else 0).named_parameters())
        with torch.no_grad():
            for name, parameter in self.built.parameters.items():
                part = self.built.places[name].part
                parameter.copy_(part.take(whole[name]) if part else whole[name])
        settings = OptimizerSettings(
            name=case.get("optimizer", "adamw"), lr=plain.LR, beta1=plain.BETAS[0], beta2=plain.BETAS[1], eps=plain.EPS, weight_decay=plain.DECAY
        )  # fmt: skip
        self.pipeline = Pipeline(
            self.built, processes, optimizer=settings, clip=plain.CLIP, dtype=dtype, device=device, vocabulary_size=config.vocab_size
        )  # fmt: skip
        self.reader: Any = MemoryReader(DOCUMENTS, config.vocab_size, SEQ)
        self.feed = Feed(
            self.reader, capacity=2 * SEQ, replicas=layout.dp, replica=processes.replica, loss_mask=0.0,
            multiple=layout.tp if layout.sequence_parallel else 1,
        )  # fmt: skip
        self.sampler = Sampler(DOCUMENTS, GLOBAL_BATCH, SEED)

    def train(self, start: int, iterations: int) -> list[list[float]]:
        from sft.engine.trainer import train

        records = train(
            self.pipeline, self.feed, self.sampler, self.reader, rate=lambda k: plain.LR / k, start=start, iterations=iterations
        )  # fmt: skip
        return [[record["loss"], record["grad_norm"]] for record in records]

    def everything(self) -> dict[str, torch.Tensor]:
        """What the model computes with, and what the optimizer knows, in this process."""
        from sft.checkpoint import state

        found = {f"{piece.name}|{piece.state}": piece.live.clone() for piece in state.pieces(self.pipeline)}
        found |= {name: parameter.detach().clone() for name, parameter in self.built.parameters.items()}
        return found | {"step": torch.tensor(state.optimizer_step(self.pipeline))}


def run_case(case: dict[str, Any], device: torch.device, root: Path) -> dict[str, Any]:
    """{losses and gradient norms, whether parameters, moments and step were bit by bit those of the run without interruption}."""
    from sft.checkpoint.commit import find_latest, peers_of
    from sft.checkpoint.fragments import Checkpoint
    from sft.checkpoint.resume import restore, save, snapshot, start_saving

    peers = peers_of()
    run = Case(case, device)
    if case.get("resume"):
        start = restore(run.pipeline, Checkpoint(root / case["resume"] / f"step-{SAVED_AFTER:07d}"), peers)
        result: dict[str, Any] = {"losses": run.train(start, ITERATIONS)}
        if case.get("same"):
            kept = torch.load(root / f"{case['resume']}-{dist.get_rank()}.pt")
            now = run.everything()
            result["differ"] = [name for name in kept.keys() | now.keys() if not torch.equal(kept[name], now[name])]
    elif case.get("unsaved"):
        result = {"losses": run.train(0, ITERATIONS)}
    else:
        folder = root / case["name"]
        first = run.train(0, SAVED_AFTER)
        taken = snapshot(run.pipeline)
        pending = start_saving(taken, folder, iteration=SAVED_AFTER, facts={"case": case["name"]}, peers=peers, limit_bytes=20_000)
        rest = run.train(SAVED_AFTER, SAVED_AFTER + 1)
        while pending.poll() is None:
            pass
        result = {"losses": first + rest + run.train(SAVED_AFTER + 1, ITERATIONS)}
        torch.save(run.everything(), root / f"{case['name']}-{dist.get_rank()}.pt")
        found, skipped = find_latest(folder, peers=peers)
        assert found is not None
        assert found.iteration == SAVED_AFTER
        assert not skipped
    save(run.pipeline, root / f"{case['name']}-end", iteration=ITERATIONS, facts={}, peers=peers)
    return result


def main(cases_file: str, root: str) -> None:
    device = start_worker(timeout_seconds=120)
    for case in json.loads(Path(cases_file).read_text()):
        result = run_case(case, device, Path(root))
        (Path(root) / f"{case['name']}-{dist.get_rank()}.json").write_text(json.dumps(result))
    stop_worker()


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main(*sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        raise
