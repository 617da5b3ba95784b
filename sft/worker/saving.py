"""When a run saves, what it records with a checkpoint, and what must be unchanged to resume from one."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sft.checkpoint import commit, resume
from sft.checkpoint.commit import Peers, PendingSave
from sft.checkpoint.fragments import Checkpoint
from sft.config.quantisation import FLAGS, quantisation_of
from sft.config.settings import FIXED, defaults
from sft.engine.pipeline import Pipeline
from sft.spec.errors import CheckpointError
from sft.spec.run import RunSpec
from tokenize_data.errors import UserError, shorten
from tokenize_data.manifest import Manifest
from tokenize_data.reader import ShardReader

KEPT_TOKENIZER = "tokenizer"  # in the run's folder, because retokenising replaces the data set's copy
# What must not change on resume, besides the settings that are marked as fixed.
_RESOLVED = ("data", "base_fingerprint", "adapter_fingerprint")


class Saver:
    """Saves checkpoints in the background, one at a time. All methods are collective calls."""

    def __init__(
        self, spec: RunSpec, pipeline: Pipeline, peers: Peers, facts: Mapping[str, Any], warn: Callable[[str], None]
    ) -> None:
        self._spec, self._pipeline, self._peers, self._facts, self._warn = spec, pipeline, peers, facts, warn
        self._pending: PendingSave | None = None
        self._is_whole = False
        self.best: int | None = None  # iteration of the best checkpoint, which is never pruned

    def save(self, iteration: int, result: Mapping[str, Any], *, is_final: bool = False) -> None:
        """Start saving, after the previous save has finished. `is_final`: no training happens until it is written."""
        self.finish()
        facts = {**self._facts, "result": dict(result), "next_batch": next_batch(self._spec, iteration)}
        try:
            taken = self._snapshot(iteration, is_final)
            self._pending = resume.start_saving(
                taken, self._spec.folder, iteration=iteration, facts=facts, peers=self._peers
            )
            self._is_whole = True
        except CheckpointError as error:
            self._is_whole = False
            self._warn(str(error))

    def _snapshot(self, iteration: int, is_final: bool) -> resume.Snapshot:
        """Copy the state. If any process lacks the memory, no process saves, and training continues."""
        taken, error = None, None
        try:
            taken = resume.snapshot(self._pipeline, is_final=is_final)
        except (MemoryError, RuntimeError) as caught:  # torch raises RuntimeError when memory runs out
            error = f"rank {self._peers.rank}: {shorten(caught, 160)}"
        failed = [reason for reason in self._peers.gather(error) if reason]
        if failed or taken is None:
            raise CheckpointError(
                f"the checkpoint of iteration {iteration} was not saved ({'; '.join(failed[:3])}): too little memory "
                "for its copy; "
                "training goes on, and earlier checkpoints are untouched"
            )
        return taken

    def poll(self) -> None:
        """Commit a checkpoint that has been written. Called between iterations."""
        if self._pending is not None:
            self._settled(self._pending.poll)

    def finish(self) -> bool:
        """Wait for the current save. Returns False if it failed or could not start."""
        if self._pending is not None:
            self._settled(self._pending.finish)
        return self._is_whole

    def _settled(self, step: Callable[[], Path | None]) -> None:
        """A failed save is a warning: the previous checkpoint remains, and training continues."""
        try:
            if step() is None:
                return
        except CheckpointError as error:
            self._is_whole = False
            self._warn(str(error))
        self._pending = None
        if self._peers.rank == 0:
            commit.prune(self._spec.folder, self._spec.settings.output.keep, self.best)


def keep_tokenizer(spec: RunSpec, reader: ShardReader) -> None:
    """Copy the tokenizer out of the data set, for exports after the data set has changed."""
    target = spec.folder / KEPT_TOKENIZER
    scratch = target.with_name(f".{KEPT_TOKENIZER}.part")
    for folder in (scratch, target):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(reader.folder / reader.manifest.tokenizer["folder"], scratch)
    scratch.rename(target)


def facts_for(
    spec: RunSpec, names: Mapping[str, str], manifest: Manifest, adapter: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The facts that a checkpoint records about its run: enough to reject another run and to export on its own."""
    tokenizer = spec.folder / KEPT_TOKENIZER
    return {
        "config": spec.asked.as_json(),
        "resolved": spec.facts(),
        "versions": spec.versions,
        "names": dict(names),
        "vocabulary_size": spec.vocabulary_size,
        "tokenizer_folder": str(tokenizer.resolve()),
        "tokenizer": manifest.tokenizer["fingerprint"],
        "template": manifest.template,
        "adapter": adapter,
    }


def training_facts(facts: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """The content of training.json, which lies beside an exported model."""
    resolved = facts["resolved"]
    short = {name: resolved[name] for name in ("base", "base_fingerprint", "data")}
    kept = {name: facts[name] for name in ("tokenizer", "template", "config", "resolved", "versions")}
    return {**short, "run_name": facts["config"]["run_name"], **kept, "result": dict(result)}


def next_batch(spec: RunSpec, iteration: int) -> str:
    """A hash of the documents of the iteration after `iteration`."""
    return hashlib.sha256(spec.sampler.documents(iteration).tobytes()).hexdigest()


def go_on(
    spec: RunSpec, pipeline: Pipeline, peers: Peers, say: Callable[[str], None], warn: Callable[[str], None]
) -> int:
    """Restore the latest checkpoint. Returns its iteration, 0 without one. A collective call."""
    checkpoint, skipped = commit.find_latest(spec.folder, peers=peers)
    for line in skipped:
        warn(line)
    if checkpoint is None:
        return 0
    check(spec, checkpoint)
    iteration = resume.restore(pipeline, checkpoint, peers)
    epoch = spec.sampler.epoch(iteration)
    layout = checkpoint.manifest["layout"]
    made = f"made with tp {layout['tp']} x pp {layout['pp']} x dp {layout['dp']}"
    if layout["tp"] != spec.layout.tp and spec.settings.adapters.quantisation:
        warn(
            f"each process quantises its own slices: with tp {spec.layout.tp} instead of {layout['tp']} the "
            "base's values differ a little"
        )
    say(f"resumed after iteration {iteration:,}, epoch {epoch:.2f}, from {checkpoint.folder}, {made}")
    return iteration


def check(spec: RunSpec, checkpoint: Checkpoint) -> None:
    """Raise UserError if the checkpoint belongs to other data or settings; the message has both values."""
    facts = checkpoint.manifest["facts"]
    compared = [(name, facts["resolved"].get(name), spec.facts()[name]) for name in _RESOLVED]
    known, current = defaults(), spec.asked.as_json()  # settings that a checkpoint does not record had their defaults
    made = {"weight_only_8bit": facts["config"].get("load_in_8bit", False), **facts["config"]}  # the older name
    is_same_format = quantisation_of(made) == quantisation_of(current)  # each format has two spellings
    compared += [
        (name, made.get(name, known[name]), current[name])
        for name in FIXED
        if not (is_same_format and name in (*FLAGS, "quantise"))
    ]
    for name, there, here in compared:
        if there != here:
            raise UserError(
                f"{checkpoint.folder} was made with {name} {_short(there)}, this run has {_short(here)}: "
                "use the same, or start another run with --id"
            )
    if checkpoint.iteration > spec.iterations:
        raise UserError(
            f"{checkpoint.folder} is past the {spec.iterations:,} iterations of this run: raise --iters, or use --id"
        )
    if checkpoint.iteration < spec.iterations and facts["next_batch"] != next_batch(spec, checkpoint.iteration):
        raise UserError(
            f"{checkpoint.folder} would resume with other documents than this run: numpy's permutations differ; "
            "use its version"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:16]}..."
