"""The training loop: iterations, validation, checkpoints and early stopping."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from sft.checkpoint import resume
from sft.checkpoint.commit import Peers
from sft.checkpoint.fragments import Checkpoint
from sft.checkpoint.manifest import damage, step_name
from sft.engine.feed import Batch, Feed, MicroBatch
from sft.engine.pipeline import Pipeline
from sft.engine.trainer import VALIDATION_DOCUMENTS, train, validate
from sft.plan.schedule import learning_rate
from sft.spec import metrics
from sft.spec.errors import CheckpointError, TrainingError
from sft.spec.run import OpenData, RunSpec
from sft.worker.ending import Interrupt, PreemptedError
from sft.worker.saving import Saver
from sft.worker.watch import Watch
from sft.worker.watchdog import Watchdog
from tokenize_data.errors import UserError
from tokenize_data.reader import ShardReader

_NO_FIGURES = ("val_documents", "val_seconds")


def iterate(
    spec: RunSpec,
    data: OpenData,
    pipeline: Pipeline,
    watch: Watch,
    saver: Saver,
    peers: Peers,
    start: int,
    watchdog: Watchdog,
    interrupt: Interrupt,
) -> dict[str, Any]:
    """Run the iterations after `start`. Returns the result as training.json records it."""
    settings, layout = spec.settings, spec.layout
    make_feed = partial(
        Feed,
        capacity=spec.capacity,
        replicas=layout.dp,
        replica=pipeline.processes.replica,
        objective=pipeline.objective,
        multiple=layout.tp if layout.sequence_parallel else 1,
        keyed=settings.adapters.has_dropout,
    )
    validation = _BeatingFeed(watchdog.beat, data.validation, **make_feed.keywords) if data.validation else None
    best = _Best(settings.output.early_stopping, settings.output.early_stopping_min_delta)
    for earlier, loss in _earlier_validations(spec, peers, start):
        best.is_better(earlier, loss)
    saver.best = best.iteration
    parts = data.validation.parts if data.validation is not None else {}
    loop = _Loop(spec, pipeline, watch, saver, watchdog, interrupt, validation, parts, best, start)
    began = time.perf_counter()
    try:
        for record in train(
            pipeline,
            make_feed(data.training),
            spec.sampler,
            data.training,
            rate=_rate(spec),
            start=start,
            iterations=spec.iterations,
        ):
            if loop.is_enough_after(record):
                break
    except (UserError, OSError, TrainingError) as error:  # none of these errors can occur in the middle of an update
        if peers.size == 1 or isinstance(
            error, TrainingError
        ):  # raised on all processes together; any other error is this process's alone
            loop.save_before_the_end(start)
        raise
    loop.finish(peers)
    return {**loop.result, "seconds": round(time.perf_counter() - began, 1)}


def _rate(spec: RunSpec) -> Callable[[int], float]:
    """Return the learning rate as a function of the iteration."""
    schedule = spec.settings.schedule
    warmup = schedule.warmup_fraction
    if schedule.warmup_iters is not None:
        warmup = min(1.0, max(schedule.warmup_iters - 0.5, 0.0) / spec.iterations)
    return partial(
        learning_rate,
        iterations=spec.iterations,
        lr=schedule.lr,
        min_lr=schedule.min_lr,
        warmup_fraction=warmup,
        schedule=schedule.schedule,
        cycles=schedule.schedule_cycles,
        power=schedule.schedule_power,
        decay_fraction=schedule.decay_fraction,
    )


def _measure(spec: RunSpec) -> str:
    """The validation loss that selects the best model."""
    part = spec.settings.output.early_stopping_on
    return "val_loss" if part is None else f"val_loss/{part}"


class _BeatingFeed(Feed):
    """A feed that reports each row to the watchdog, so that a long validation does not count as a hang."""

    def __init__(self, beat: Callable[[], None], reader: ShardReader, **settings: Any) -> None:
        super().__init__(reader, **settings)
        self._beat = beat

    def micro_batches(self, batch: Batch, counted: int | None = None) -> Iterator[MicroBatch]:
        self._beat()
        for one in super().micro_batches(batch, counted):
            yield one
            self._beat()


class _Loop:
    """What happens after each iteration: metrics, validation, checkpoints, stopping."""

    def __init__(
        self,
        spec: RunSpec,
        pipeline: Pipeline,
        watch: Watch,
        saver: Saver,
        watchdog: Watchdog,
        interrupt: Interrupt,
        validation: Feed | None,
        parts: Mapping[str, range],
        best: _Best,
        start: int,
    ) -> None:
        self._spec, self._pipeline, self._watch, self._saver = spec, pipeline, watch, saver
        self._watchdog, self._interrupt, self._validation, self._best = watchdog, interrupt, validation, best
        self._parts, self._measure = parts, _measure(spec)
        self._has_left = False
        self.result: dict[str, Any] = {"iterations": start}

    def is_enough_after(self, record: dict[str, Any]) -> bool:
        """Validate, report and save. Returns whether training stops early."""
        spec, settings, best = self._spec, self._spec.settings, self._best
        number, should_stop = record["iteration"], self._pipeline.should_stop
        self._watchdog.beat(is_iteration=True)
        self.result |= {"loss": record["loss"], "iterations": number}
        is_last = number == spec.iterations
        is_better = False
        if self._validation is not None and (number % settings.output.eval_interval == 0 or is_last):
            record |= self._validated()
            is_better = best.is_better(number, record[self._measure])
        self._tell(record, is_last)
        self._watchdog.beat()
        if is_better and settings.output.early_stopping:
            self._saver.best = number
        with self._saving():
            if (
                number % settings.output.save_interval == 0
                or is_last
                or should_stop
                or (is_better and settings.output.early_stopping)
            ):
                self._saver.save(number, self.result, is_final=is_last or should_stop or best.is_enough)
            self._saver.poll()
            if should_stop and not is_last:
                self._leave(number)
        if best.is_enough:
            on = spec.settings.output.early_stopping_on
            waited = f"{best.patience} validations without a better loss{f' of {on}' if on else ''}"
            least = (
                f" by more than {settings.output.early_stopping_min_delta:g}"
                if settings.output.early_stopping_min_delta
                else ""
            )
            self._watch.say(f"stopped early: {waited} than {best.loss:.4f}{least}, of iteration {best.iteration:,}")
        return best.is_enough

    def save_before_the_end(self, start: int) -> None:
        """Save before the run ends for whatever reason."""
        number = self.result["iterations"]
        if number == start or self._has_left:
            return
        with self._saving():
            self._saver.save(number, self.result, is_final=True)
            if self._saver.finish():
                self._watch.warn(f"iteration {number:,} was saved before the run ends: run the same command to resume")

    def finish(self, peers: Peers) -> None:
        """Wait for the last checkpoint. With early stopping, restore the best one."""
        with self._saving():
            self._saver.finish()
        best, spec = self._best, self._spec
        if (
            spec.settings.output.early_stopping
            and best.iteration is not None
            and best.iteration != self.result["iterations"]
        ):
            with self._watchdog.during("reading the best checkpoint"):
                resume.restore(self._pipeline, Checkpoint(spec.folder / step_name(best.iteration)), peers)
            self._watch.say(
                f"the model of iteration {best.iteration:,} is exported, with the best validation loss, {best.loss:.4f}"
            )
            self.result |= {"iterations": best.iteration, self._measure: best.loss}

    def _validated(self) -> dict[str, float]:
        assert self._validation is not None
        assert self._spec.validation is not None
        num_documents = self._spec.validation.documents
        worth = min(num_documents, VALIDATION_DOCUMENTS) / self._spec.settings.schedule.global_batch
        with self._watchdog.during("validating", iterations=max(1.0, worth)):
            found = validate(self._pipeline, self._validation, self._parts)
        self.result |= {name: value for name, value in found.items() if name not in _NO_FIGURES}
        return found

    def _tell(self, record: dict[str, Any], is_last: bool) -> None:
        """Report the iteration. If that fails, for instance on a full disk, all processes save before the run ends."""
        try:
            self._watch.record(record)
        except (UserError, OSError) as error:
            if is_last:
                self._watch.warn(str(error))
            self._interrupt.because(error)

    def _saving(self) -> Any:
        return self._watchdog.during("saving", folder=self._spec.folder)

    def _leave(self, iteration: int) -> None:
        """Save and raise; the message says whether saving succeeded."""
        is_saved, self._has_left = self._saver.finish(), True
        if self._interrupt.error is not None:
            raise self._interrupt.error
        if not is_saved:
            raise CheckpointError(
                f"a signal asked to stop after iteration {iteration:,}, which could not be saved: see the warning above"
            )
        raise PreemptedError(
            f"stopped by a signal after iteration {iteration:,}, which is saved: run the same command to resume"
        )


def _earlier_validations(spec: RunSpec, peers: Peers, start: int) -> list[tuple[int, float]]:
    """The validations before a resume, so that early stopping continues as if the run had not been interrupted. Empty
    if the best checkpoint is gone.
    """
    found = []
    if spec.settings.output.early_stopping and start and peers.rank == 0:
        records = metrics.read(spec.folder / "metrics.jsonl")
        pairs = [
            (int(record["iteration"]), metrics.number(record, _measure(spec)))
            for record in records
            if record.get("iteration", 0) <= start
        ]
        found = [(iteration, loss) for iteration, loss in pairs if loss is not None]
        if found and damage(spec.folder / step_name(min(found, key=lambda pair: pair[1])[0])) is not None:
            found = []
    earlier: list[tuple[int, float]] = peers.gather(found)[0]
    return earlier


class _Best:
    """The best validation so far, and the number of validations since the last improvement by more than `min_delta`."""

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
