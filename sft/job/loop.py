"""All iterations of a run: training, validations, checkpoints, early stopping, in their order."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from sft.checkpoint import resume
from sft.checkpoint.commit import CheckpointError, Peers
from sft.checkpoint.fragments import Checkpoint
from sft.checkpoint.manifest import damage, step_name
from sft.engine.feed import Feed
from sft.engine.pipeline import Pipeline
from sft.engine.trainer import train, validate
from sft.job.ending import PreemptedError
from sft.job.prepare import Job
from sft.job.saving import Saver
from sft.job.watch import Watch
from sft.observe import metrics
from sft.plan.schedule import learning_rate

_VALIDATION_KEYS = ("val_loss", "val_perplexity", "val_accuracy")


def iterate(
    job: Job, pipeline: Pipeline, watch: Watch, saver: Saver, peers: Peers, start: int, beat: Callable[..., None]
) -> dict[str, Any]:
    """From `start` to the end. Returns what training.json says of the result."""
    config = job.config
    make_feed = partial(
        Feed, capacity=job.capacity, replicas=job.layout.dp, replica=pipeline.processes.replica, loss_mask=config.loss_mask,
        multiple=job.layout.tp if job.layout.sequence_parallel else 1, keyed=config.lora is not None and config.lora_dropout > 0,
    )  # fmt: skip
    validation = make_feed(job.validation) if job.validation else None
    warmup = config.warmup_fraction if config.warmup_iters is None else min(1.0, max(config.warmup_iters - 0.5, 0.0) / job.iterations)
    rate = partial(
        learning_rate, iterations=job.iterations, lr=config.lr, min_lr=config.min_lr, warmup_fraction=warmup, schedule=config.schedule
    )
    result: dict[str, Any] = {"iterations": start}
    best = _Best(config.early_stopping, config.early_stopping_min_delta)
    for earlier, loss in _earlier_validations(job, peers, start):
        best.is_better(earlier, loss)
    saver.best = best.iteration
    began = time.perf_counter()
    for record in train(pipeline, make_feed(job.reader), job.sampler, job.reader, rate=rate, start=start, iterations=job.iterations):
        number = record["iteration"]
        is_last = number == job.iterations
        is_better = False
        if validation is not None and job.validation is not None and (number % config.eval_interval == 0 or is_last):
            record |= validate(pipeline, validation, len(job.validation))
            result |= {key: record[key] for key in _VALIDATION_KEYS}
            is_better = best.is_better(number, record["val_loss"])
        result |= {"loss": record["loss"], "iterations": number}
        watch.record(record)
        beat(is_iteration=True)
        if is_better and config.early_stopping:
            saver.best = number
        is_final = is_last or pipeline.should_stop or best.is_enough
        if number % config.save_interval == 0 or is_last or pipeline.should_stop or (is_better and config.early_stopping):
            saver.save(number, result, is_final=is_final)
        saver.poll()
        beat()
        if pipeline.should_stop and not is_last:
            _leave(saver, number)
        if best.is_enough:
            waited = f"{best.patience} validations without a better loss"
            least = f" by more than {config.early_stopping_min_delta:g}" if config.early_stopping_min_delta else ""
            watch.say(f"stopped early: {waited} than {best.loss:.4f}{least}, of iteration {best.iteration:,}")
            break
    saver.finish()
    if config.early_stopping and best.iteration is not None and best.iteration != result["iterations"]:
        resume.restore(pipeline, Checkpoint(job.folder / step_name(best.iteration)), peers)
        watch.say(f"the model of iteration {best.iteration:,} is exported, with the best validation loss, {best.loss:.4f}")
        result |= {"iterations": best.iteration, "val_loss": best.loss}
    return {**result, "seconds": round(time.perf_counter() - began, 1)}


def _leave(saver: Saver, iteration: int) -> None:
    """A signal came: what was trained is saved, or it is said that it could not be."""
    if not saver.finish():
        raise CheckpointError(f"a signal asked to stop after iteration {iteration:,}, which could not be saved: see the warning above")
    raise PreemptedError(f"stopped by a signal after iteration {iteration:,}, which is saved: the same command goes on from there")


def _earlier_validations(job: Job, peers: Peers, start: int) -> list[tuple[int, float]]:
    """What a run that goes on has validated before, where the checkpoint of the best is still there: it counts as if it had gone on."""
    found = []
    if job.config.early_stopping and start and peers.rank == 0:
        records = metrics.read(job.folder / "metrics.jsonl")
        pairs = [
            (int(record["iteration"]), metrics.number(record, "val_loss")) for record in records if record.get("iteration", 0) <= start
        ]
        found = [(iteration, loss) for iteration, loss in pairs if loss is not None]
        if found and damage(job.folder / step_name(min(found, key=lambda pair: pair[1])[0])) is not None:
            found = []
    earlier: list[tuple[int, float]] = peers.gather(found)[0]
    return earlier


class _Best:
    """The best validation so far, and how many have passed since one that was better by more than the least that counts."""

    def __init__(self, patience: int | None, min_delta: float = 0.0) -> None:
        self.patience, self.loss, self.iteration = patience, float("inf"), None
        self._min_delta, self._counted, self._worse = min_delta, float("inf"), 0

    iteration: int | None

    def is_better(self, iteration: int, loss: float) -> bool:
        if loss < self._counted - self._min_delta:
            self._counted, self._worse = loss, 0
        else:
            self._worse += 1
        is_lowest = loss < self.loss
        if is_lowest:
            self.loss, self.iteration = loss, iteration
        return is_lowest

    @property
    def is_enough(self) -> bool:
        return self.patience is not None and self._worse >= self.patience
