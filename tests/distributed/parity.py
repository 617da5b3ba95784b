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
    """One process's part: its gradients of the first iteration, complete but not yet averaged over replicas, and its float32 weights."""
    run = worker.prepare(case, device)
    first: dict[str, Tensor] = {}

    def note(gradients: dict[str, Tensor]) -> None:
        if not first:
            first.update({name: gradient.detach().float().clone().view_as(run.built.parameters[name]) for name, gradient in gradients.items()})

    run.pipeline.on_gradients = note
    before = _masters(run)
    records = [(record["loss"], record["grad_norm"]) for record in run.train()]
    return {
        "records": records, "gradients": first, "replica": run.processes.replica, "before": before, "after": _masters(run),
        "parts": {name: (run.built.places[name].part, run.built.places[name].shape) for name in run.built.places},
        "weights": run.weights(), "run": run,
        "quantized": {name: weight.whole() for name, weight in run.built.quantized.items()},
    }  # fmt: skip


def _masters(run: Any) -> list[tuple[str, int, Tensor]]:
    from sft.checkpoint import state

    with state.opened(run.pipeline) as pieces:
        return [(piece.name, piece.offset, piece.live.detach().clone()) for piece in pieces if piece.state == state.MASTER]


def whole(ranks: list[dict[str, Any]]) -> Trained:
    """The run of all ranks together."""
    replicas = 1 + max(rank["replica"] for rank in ranks)
    gradients: dict[str, Tensor] = {}
    for replica in range(replicas):
        own: dict[str, Tensor] = {}
        for rank in ranks:
            if rank["replica"] == replica:
                for name, gradient in rank["gradients"].items():
                    _put(own, name, rank["parts"][name], gradient)
        for name, gradient in own.items():
            gradients[name] = gradients.get(name, 0.0) + gradient / replicas
    weights: dict[str, Tensor] = {}
    for rank in ranks:
        for name, weight in rank["weights"].items():
            _put(weights, name, rank["parts"][name], weight)
    before, after = (_joined(ranks, moment) for moment in ("before", "after"))
    return Trained(
        records=ranks[0]["records"], gradients=gradients, updates={name: after[name] - before[name] for name in after}, weights=weights
    )  # fmt: skip


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


def expected(case: dict[str, Any], ranks: list[dict[str, Any]], dtype: torch.dtype | None = None) -> Trained:
    """The same by the reference. Quantised weights are what the ranks made of them."""
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
    sampler = Sampler(worker.DOCUMENTS, case.get("global_batch", worker.GLOBAL_BATCH), worker.SEED)
    batches = [sampler.documents(number).astype(np.int64) for number in range(case.get("iterations", worker.ITERATIONS))]
    reader = MemoryReader(worker.DOCUMENTS, config.vocab_size, worker.SEQ)
    make = reference.OPTIMIZERS[case.get("optimizer", "adamw")]
    return reference.train(model, reader, batches, case.get("loss_mask", 0.0), make, name_of)
