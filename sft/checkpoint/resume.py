"""Saves a pipeline's training state and resumes from it on any layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sft.checkpoint.commit import Peers, PendingSave
from sft.checkpoint.fragments import Checkpoint, Fragment, Later, write_fragments
from sft.optimizer import states
from sft.optimizer.eight_bits import EightBits
from sft.optimizer.states import MASTER, Piece
from sft.spec.errors import CheckpointError
from tokenize_data.errors import UserError, shorten

if TYPE_CHECKING:
    from sft.engine.pipeline import Pipeline

_READERS = 4
_PINNED_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A copy of what this process saves, so that training can continue."""

    fragments: list[Fragment]
    optimizer_step: int
    states: list[str]
    layout: dict[str, int]


def snapshot(pipeline: Pipeline, *, is_final: bool = False) -> Snapshot:
    """Copy the state to host memory. With `is_final`, write training's own memory instead, since it no longer
    changes.
    """
    optimizer = pipeline.optimizer
    copy = _as_it_is if is_final else _Copier(pipeline.device)
    fragments = []
    for piece in states.pieces(optimizer):
        if optimizer.is_first_holder(piece.name, of_all=piece.shape is not None):
            place = pipeline.built.places[piece.name]
            fragment = Fragment(
                name=piece.name,
                state=piece.state,
                shape=piece.shape or place.shape,
                part=None if piece.shape else place.part,
                offset=piece.offset,
                values=_values(piece, copy),
                is_of_parameters_shape=piece.shape is None,
            )
            fragments.append(fragment)
    layout = pipeline.processes.layout
    return Snapshot(
        fragments=fragments,
        optimizer_step=optimizer.num_steps,
        states=[MASTER, *optimizer.spec.states],
        layout={"tp": layout.tp, "pp": layout.pp, "dp": layout.dp},
    )


def start_saving(
    taken: Snapshot,
    root: Path,
    *,
    iteration: int,
    facts: Mapping[str, Any],
    peers: Peers,
    limit_bytes: int | None = None,
) -> PendingSave:
    """Start saving in a thread and return at once. `facts` are JSON; rank 0's are stored. A collective call."""
    content = {
        "optimizer_step": taken.optimizer_step,
        "states": taken.states,
        "layout": taken.layout,
        "facts": dict(facts),
    }
    return PendingSave(
        root,
        iteration,
        lambda folder: write_fragments(folder, taken.fragments, peers.rank, peers.size, limit_bytes),
        content,
        peers,
    )


def save(pipeline: Pipeline, root: Path, *, iteration: int, facts: Mapping[str, Any], peers: Peers) -> Path:
    """Save and wait. Returns the folder of the committed checkpoint. A collective call."""
    return start_saving(snapshot(pipeline, is_final=True), root, iteration=iteration, facts=facts, peers=peers).finish()


def restore(pipeline: Pipeline, checkpoint: Checkpoint, peers: Peers) -> int:
    """Restore weights, optimizer states and step count. Returns the checkpoint's iteration. A collective call."""
    error: str | None = None
    cause: Exception | None = None
    try:
        _refuse_other_states(pipeline, checkpoint)
        _refuse_other_shapes(pipeline, checkpoint)
        with ThreadPoolExecutor(_READERS) as pool:
            list(pool.map(lambda piece: _read(pipeline, checkpoint, piece), states.pieces(pipeline.optimizer)))
        states.set_count_of_steps(pipeline.optimizer, int(checkpoint.manifest["optimizer_step"]))
    except Exception as caught:  # the others wait for this one
        error, cause = (
            str(caught) if isinstance(caught, UserError) else f"{type(caught).__name__}: {shorten(caught, 200)}",
            caught,
        )
    reports = peers.gather((error, pipeline.optimizer.names))
    failed = [f"rank {rank}: {reason}" for rank, (reason, _) in enumerate(reports) if reason]
    if failed:
        raise CheckpointError(failed[0]) from cause
    superfluous = sorted(set(checkpoint.names()) - {name for _, names in reports for name in names})
    if superfluous:
        what = f"{len(superfluous)} parameters that are not trained now, such as {superfluous[0]}"
        raise CheckpointError(
            f"{checkpoint.folder} holds {what}: train what it was made with, or start another run from its export"
        )
    pipeline.optimizer.publish()
    return checkpoint.iteration


def _read(pipeline: Pipeline, checkpoint: Checkpoint, piece: Piece) -> None:
    with torch.no_grad():  # each thread has its own
        part = None if piece.shape else pipeline.built.places[piece.name].part
        numbers = piece.numbers()
        checkpoint.read_into(numbers, piece.name, piece.state, part, piece.offset)
        if isinstance(piece.live, EightBits):
            piece.live.put(numbers)


def _values(piece: Piece, copy: Callable[[Tensor], Tensor]) -> Tensor | Later:
    """Convert 8-bit states to numbers when they are written."""
    if isinstance(piece.live, EightBits):
        codes = piece.live.copied(copy)
        return Later(codes.codes.numel(), torch.float32, lambda: codes.numbers().cpu())
    values = copy(piece.live)
    if values.device.type == "cpu":
        return values
    return Later(values.numel(), values.dtype, values.cpu)


def _as_it_is(live: Tensor) -> Tensor:
    return live


class _Copier:
    """Copies into ordinary host memory, which is freed after writing; from a GPU through two pinned buffers of fixed
    size.
    """

    def __init__(self, device: torch.device) -> None:
        is_gpu = device.type == "cuda"
        self._buffers = (
            [torch.empty(_PINNED_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)] if is_gpu else []
        )

    def __call__(self, live: Tensor) -> Tensor:
        if not self._buffers:
            return live.clone()
        copy = torch.empty(live.shape, dtype=live.dtype)
        given, taken = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (live, copy))
        waiting: tuple[Tensor, Tensor, torch.cuda.Event] | None = None
        for number, (source, target) in enumerate(
            zip(given.split(_PINNED_BYTES), taken.split(_PINNED_BYTES), strict=True)
        ):
            buffer = self._buffers[number % 2][: source.numel()]
            buffer.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            _settle(waiting)  # one buffer is emptied while the other is filled
            waiting = (buffer, target, event)
        _settle(waiting)
        return copy


def _settle(waiting: tuple[Tensor, Tensor, torch.cuda.Event] | None) -> None:
    if waiting is not None:
        buffer, target, event = waiting
        event.synchronize()
        target.copy_(buffer)


def _refuse_other_states(pipeline: Pipeline, checkpoint: Checkpoint) -> None:
    spec, there = pipeline.optimizer.spec, checkpoint.states()
    here = [MASTER, *spec.states]
    if spec.name == "adafactor" and there == [MASTER, "exp_avg_sq"]:
        raise UserError(
            f"{checkpoint.folder} is of an earlier release, whose adafactor kept a moment for each weight: it cannot "
            "be resumed; "
            "export it with `sft export` and start another run from the result"
        )
    if here != there:
        remedy = "use the --optimizer that it was made with"
        raise UserError(
            f"{checkpoint.folder} holds {', '.join(there)} and this optimizer has {', '.join(here)}: {remedy}"
        )


def _refuse_other_shapes(pipeline: Pipeline, checkpoint: Checkpoint) -> None:
    present = set(checkpoint.names())
    for name in pipeline.optimizer.names:
        shape = pipeline.built.places[name].shape
        if name not in present:
            raise UserError(f"{checkpoint.folder} has no {name}, which is trained now: train what it was made with")
        if checkpoint.whole_shape(name) != shape:
            there = list(checkpoint.whole_shape(name))
            raise UserError(
                f"{checkpoint.folder} has {name} as {there}, the model as {list(shape)}: use the model that it "
                "was made with"
            )
