"""Saving a pipeline's training state, and going on from it with any layout."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sft.checkpoint import state
from sft.checkpoint.commit import CheckpointError, Peers, PendingSave
from sft.checkpoint.fragments import Checkpoint, Fragment, write_fragments
from tokenize_data.errors import UserError, shorten

if TYPE_CHECKING:
    from sft.engine.pipeline import Pipeline

_READERS = 4


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What this process has to write, copied: training may go on."""

    fragments: list[Fragment]
    optimizer_step: int
    states: list[str]
    layout: dict[str, int]


def snapshot(pipeline: Pipeline) -> Snapshot:
    """Copies into the host's memory, all of them under way at once where the state is on a GPU."""
    fragments = []
    with state.opened(pipeline) as pieces:
        for piece in pieces:
            if state.is_written_here(pipeline, piece.name):
                place = pipeline.built.places[piece.name]
                fragment = Fragment(
                    name=piece.name, state=piece.state, shape=place.shape, part=place.part, offset=piece.offset, values=_copied(piece.live)
                )  # fmt: skip
                fragments.append(fragment)
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)
    layout = pipeline.processes.layout
    return Snapshot(
        fragments=fragments, optimizer_step=state.optimizer_step(pipeline), states=state.state_names(pipeline),
        layout={"tp": layout.tp, "pp": layout.pp, "dp": layout.dp},
    )  # fmt: skip


def start_saving(
    taken: Snapshot, root: Path, *, iteration: int, facts: Mapping[str, Any], peers: Peers, limit_bytes: int | None = None
) -> PendingSave:
    """A collective call that returns at once: a thread writes. `facts` are JSON, rank 0's are stored."""
    content = {"optimizer_step": taken.optimizer_step, "states": taken.states, "layout": taken.layout, "facts": dict(facts)}
    return PendingSave(
        root, iteration, lambda folder: write_fragments(folder, taken.fragments, peers.rank, peers.size, limit_bytes), content, peers
    )  # fmt: skip


def save(pipeline: Pipeline, root: Path, *, iteration: int, facts: Mapping[str, Any], peers: Peers) -> Path:
    """A collective call. Returns the checkpoint's folder when it is on the disk and visible."""
    return start_saving(snapshot(pipeline), root, iteration=iteration, facts=facts, peers=peers).finish()


def restore(pipeline: Pipeline, checkpoint: Checkpoint, peers: Peers) -> int:
    """A collective call: weights, optimizer states and step count. Returns the iteration after which the checkpoint was taken."""
    error: str | None = None
    cause: Exception | None = None
    try:
        _refuse_other_states(pipeline, checkpoint)
        _refuse_other_shapes(pipeline, checkpoint)
        with state.opened(pipeline, writes=True) as pieces, ThreadPoolExecutor(_READERS) as pool:
            list(pool.map(lambda piece: _read(pipeline, checkpoint, piece), pieces))
        state.set_optimizer_step(pipeline, int(checkpoint.manifest["optimizer_step"]))
    except Exception as caught:  # the others wait for this one
        error, cause = str(caught) if isinstance(caught, UserError) else f"{type(caught).__name__}: {shorten(caught, 200)}", caught
    reports = peers.gather((error, state.trainable(pipeline)))
    failed = [f"rank {rank}: {reason}" for rank, (reason, _) in enumerate(reports) if reason]
    if failed:
        raise CheckpointError(failed[0]) from cause
    superfluous = sorted(set(checkpoint.names()) - {name for _, names in reports for name in names})
    if superfluous:
        what = f"{len(superfluous)} parameters that are not trained now, such as {superfluous[0]}"
        raise CheckpointError(f"{checkpoint.folder} holds {what}: train what it was made with, or start another run from its export")
    state.refresh_parameters(pipeline)
    return checkpoint.iteration


def _read(pipeline: Pipeline, checkpoint: Checkpoint, piece: state.Piece) -> None:
    with torch.no_grad():  # each thread has its own
        checkpoint.read_into(piece.live, piece.name, piece.state, pipeline.built.places[piece.name].part, piece.offset)


def _copied(live: Tensor) -> Tensor:
    if live.device.type != "cuda":
        return live.clone()
    copy = torch.empty(live.shape, dtype=live.dtype, pin_memory=True)  # torch keeps this memory for the next snapshot
    return copy.copy_(live, non_blocking=True)


def _refuse_other_states(pipeline: Pipeline, checkpoint: Checkpoint) -> None:
    here, there = state.state_names(pipeline), checkpoint.states()
    if here != there:
        remedy = "use the --optimizer that it was made with"
        raise UserError(f"{checkpoint.folder} holds {', '.join(there)} and this optimizer has {', '.join(here)}: {remedy}")


def _refuse_other_shapes(pipeline: Pipeline, checkpoint: Checkpoint) -> None:
    present = set(checkpoint.names())
    for name in state.trainable(pipeline):
        shape = pipeline.built.places[name].shape
        if name not in present:
            raise UserError(f"{checkpoint.folder} has no {name}, which is trained now: train what it was made with")
        if checkpoint.whole_shape(name) != shape:
            there = list(checkpoint.whole_shape(name))
            raise UserError(f"{checkpoint.folder} has {name} as {there}, the model as {list(shape)}: use the model that it was made with")
