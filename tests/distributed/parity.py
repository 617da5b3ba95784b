"""A case of the parity table: what each process runs of it, how ranks' parts become whole, and the reference for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sft.plan.sampler import Sampler
from tests.distributed import adapters, reference, worker
from tests.distributed.data import MemoryReader
from tests.distributed.reference import Trained


def train(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """One process's part: the first iteration's gradients before clipping, and the float32 weights, of what it owns."""
    run = worker.prepare(case, device)
    first: list[tuple[str, int, Tensor]] = []

    def note(gradients: dict[str, tuple[int, Tensor]]) -> None:
        if run.pipeline.optimizer.num_steps == 0:
            first.extend((name, offset, gradient.cpu().clone()) for name, (offset, gradient) in gradients.items())

    run.pipeline.optimizer.on_gradients = note
    before = _masters(run)
    records = [(record["loss"], record["grad_norm"]) for record in run.train()]
    return {
        "records": records,
        "gradients": first,
        "before": before,
        "after": _masters(run),
        "parts": {name: (run.built.places[name].part, run.built.places[name].shape) for name in run.built.places},
        "weights": {name: weight.cpu() for name, weight in run.weights().items()},
        "run": run,
        "quantized": {name: weight.whole().cpu() for name, weight in run.built.quantized.items()},
    }


def _masters(run: Any) -> list[tuple[str, int, Tensor]]:
    from sft.optimizer import states

    found = states.pieces(run.pipeline.optimizer)
    return [
        (piece.name, piece.offset, piece.numbers().cpu().clone()) for piece in found if piece.state == states.MASTER
    ]


def whole(ranks: list[dict[str, Any]]) -> Trained:
    """The run of all ranks together."""
    weights: dict[str, Tensor] = {}
    for rank in ranks:
        for name, weight in rank["weights"].items():
            _put(weights, name, rank["parts"][name], weight)
    gradients, before, after = (_joined(ranks, moment) for moment in ("gradients", "before", "after"))
    return Trained(
        records=ranks[0]["records"],
        gradients=gradients,
        updates={name: after[name] - before[name] for name in after},
        weights=weights,
    )


def _joined(ranks: list[dict[str, Any]], moment: str) -> dict[str, Tensor]:
    """Stretches of flat parts, from all replicas, to whole tensors."""
    parts: dict[tuple[str, Any], Tensor] = {}
    shapes: dict[str, tuple[Any, tuple[int, ...]]] = {}
    for rank in ranks:
        for name, offset, values in rank[moment]:
            part, shape = shapes[name] = rank["parts"][name]
            own = part.shape_of(shape) if part else shape
            flat = parts.setdefault((name, part), torch.full((int(np.prod(own)),), torch.nan))
            flat[offset : offset + values.numel()] = values.flatten()
    found: dict[str, Tensor] = {}
    for (name, part), flat in parts.items():
        shape = shapes[name][1]
        _put(found, name, (part, shape), flat.view(part.shape_of(shape) if part else shape))
    return found


def _put(wholes: dict[str, Tensor], name: str, place: tuple[Any, tuple[int, ...]], values: Tensor) -> None:
    part, shape = place
    if part is None:
        wholes[name] = values.clone()
    else:
        part.put(wholes.setdefault(name, torch.full(shape, torch.nan, dtype=values.dtype)), values)


def device() -> torch.device:
    """What workers train on, and so what the reference is computed on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def expected(
    case: dict[str, Any],
    ranks: list[dict[str, Any]],
    dtype: torch.dtype | None = None,
    *,
    kept_alone: bool = False,
    in_halves: bool = False,
) -> Trained:
    """The same by the reference. Quantised weights are what the ranks made of them. `in_halves`: each matmul in
    parts.
    """
    dense: dict[str, Tensor] = {}
    for rank in ranks:
        for name, values in rank["quantized"].items():
            _put(dense, name, rank["parts"][name], values.float())
    dtype = dtype or getattr(torch, case["dtype"])
    config = worker.config_of(case)
    model = reference.make_model(config, dtype, dense, case.get("attention", "eager"))
    name_of = adapters.own_name if "lora" in case else str
    if "lora" in case:
        model = adapters.with_adapters(model, case)
    model = model.to(device())
    if in_halves:
        reference.compute_in_halves(model)
    sampler = Sampler(worker.DOCUMENTS, case.get("global_batch", worker.GLOBAL_BATCH), worker.SEED)
    batches = [
        sampler.documents(number).astype(np.int64) for number in range(case.get("iterations", worker.ITERATIONS))
    ]
    reader = MemoryReader(worker.DOCUMENTS, config.vocab_size, worker.SEQ)
    make = reference.OPTIMIZERS[case.get("optimizer", "adamw")]
    return reference.train(model, reader, batches, case.get("loss_mask", 0.0), make, name_of, kept_alone=kept_alone)
