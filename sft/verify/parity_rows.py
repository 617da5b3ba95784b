"""Compares the loss and every parameter's gradient with plain transformers, on the user's base model, rows and
devices. The first process runs transformers and writes its gradients to a file, from which each process reads its
slices.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sft.checkpoint.stage import DTYPES, LoadedBase, load_stage, read_base
from sft.config.optimizer import OptimizerSpec
from sft.engine.feed import Feed
from sft.engine.groups import Processes, form_groups
from sft.engine.pipeline import Pipeline
from sft.engine.start import start_worker, stop_worker
from sft.objective.cross_entropy import CrossEntropy
from sft.optimizer.norm import square_sum
from sft.spec.run import RunSpec
from sft.verify import plain
from sft.verify.parity import TOLERANCES

_NOTHING = OptimizerSpec(
    name="sgd", lr=0.0, beta1=0.0, beta2=0.0, eps=1e-8, weight_decay=0.0
)  # only gradients are needed, no updates
_GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 0.03}  # relative to the tensor's norm
# or this multiple of the change in transformers itself with other arithmetic: float32, or another attention kernel
_NOISE = 4.0
_DEVIATIONS = 6.0  # standard deviations of a mean over tokens whose losses have independent rounding errors
_ROUNDING = {
    torch.float32: 2.0**-22,
    torch.bfloat16: 2.0**-9,
}  # relative to all gradients' norm, for sums that are only rounding
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The comparison of one parameter's gradient: squared norms over all processes."""

    ours: float
    theirs: float
    product: float
    distance: float
    other: float  # distance between transformers and transformers with other arithmetic
    count: int

    @property
    def cosine(self) -> float:
        size = (self.ours * self.theirs) ** 0.5
        return self.product / size if size else float(self.ours == self.theirs)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    losses: tuple[float, float]  # transformers', ours
    norms: tuple[float, float]
    loss_noise: float  # allowed rounding error of the mean loss, absolute
    norm_noise: float
    parameters: dict[str, Difference]
    dtype: torch.dtype
    device: str
    documents: int

    def share(self, name: str) -> float:
        """A gradient's difference relative to its tolerance."""
        one, whole = self.parameters[name], sum(other.theirs for other in self.parameters.values())
        weights = sum(other.count for other in self.parameters.values())
        rounding = _ROUNDING[self.dtype] * (whole * one.count / weights) ** 0.5
        allowed = max(_GRADIENT[self.dtype] * one.theirs**0.5, _NOISE * one.other**0.5, rounding)
        return float(one.distance**0.5 / allowed) if allowed else float(one.distance > 0) * 2

    @property
    def is_equal(self) -> bool:
        pairs = ((self.losses, self.allowed_loss), (self.norms, self.allowed_norm))
        return all(abs(a - b) <= most for (a, b), most in pairs) and all(
            self.share(name) <= 1 for name in self.parameters
        )

    @property
    def allowed_loss(self) -> float:
        return max(TOLERANCES[self.dtype][0] * abs(self.losses[0]), self.loss_noise)

    @property
    def allowed_norm(self) -> float:
        return max(TOLERANCES[self.dtype][1] * abs(self.norms[0]), self.norm_noise)


def compare(spec: RunSpec, num_documents: int, store: Any) -> Outcome | None:
    """What the processes of a comparison run. The first returns the outcome."""
    device = start_worker(store)
    dtype = DTYPES[spec.dtype]
    processes = form_groups(spec.layout)
    base = read_base(spec)
    reader = spec.data.open()
    numbers = np.arange(min(num_documents, len(reader)))
    with tempfile.TemporaryDirectory(prefix="sft-parity-") as scratch:
        mine = (
            _reference(spec, base.config.vocab_size, numbers, device, dtype, Path(scratch))
            if processes.rank == 0
            else None
        )
        told: list[Any] = [(mine, scratch)]
        dist.broadcast_object_list(told, src=0)
        reference, folder = told[0]
        pipeline = _pipeline(spec, base, processes, device)
        found: dict[str, Difference] = {}

        def measure(gradients: Mapping[str, tuple[int, Tensor]]) -> None:
            for name, (offset, gradient) in gradients.items():
                if pipeline.optimizer.is_first_holder(name):
                    part = pipeline.built.places[name].part
                    theirs, other = (_own(Path(folder) / file, name, part, offset, gradient) for file in _FILES)
                    found[name] = _difference(gradient, theirs, other)

        pipeline.optimizer.on_gradients = measure
        feed = Feed(
            reader,
            capacity=spec.capacity,
            replicas=spec.layout.dp,
            replica=processes.replica,
            objective=pipeline.objective,
            multiple=spec.layout.tp if spec.layout.sequence_parallel else 1,
        )
        batch = feed.plan(numbers)
        step = pipeline.step(feed.micro_batches(batch), feed.row_lengths(batch), 0.0)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
    rank = processes.rank
    stop_worker()
    return (
        None
        if rank
        else Outcome(
            losses=(reference.loss, step.loss),
            norms=(reference.norm, step.grad_norm),
            loss_noise=reference.loss_noise,
            norm_noise=reference.norm_noise,
            parameters=_joined(everyone),
            dtype=dtype,
            device=str(device),
            documents=len(numbers),
        )
    )


def _pipeline(spec: RunSpec, base: LoadedBase, processes: Processes, device: torch.device) -> Pipeline:
    built, _ = load_stage(spec, base, processes, device)
    return Pipeline(
        built,
        processes,
        optimizer=_NOTHING,
        objective=CrossEntropy(loss_mask=spec.settings.objective.loss_mask),
        tokens_at_once=spec.tokens_at_once,
        clip=0.0,
        device=device,
        vocabulary_size=base.config.vocab_size,
    )


_FILES = ("gradients.safetensors", "other-arithmetic.safetensors")


@dataclass(frozen=True, kw_only=True)
class _Reference:
    loss: float
    norm: float
    loss_noise: float
    norm_noise: float


def _reference(
    spec: RunSpec, vocabulary: int, numbers: np.ndarray, device: torch.device, dtype: torch.dtype, folder: Path
) -> _Reference:
    """Loss and norm by transformers, and their change with other arithmetic. Gradients of both are written to files."""
    others = (
        ((dtype, "eager"), (torch.float32, "eager"))
        if dtype is not torch.float32
        else ((dtype, "eager"), (dtype, "sdpa"))
    )
    reader = spec.data.open()
    losses, norms, tokens = [], [], []
    for file, (computed_in, kernel) in zip(_FILES, others, strict=True):
        model = _model(spec, vocabulary, dtype, kernel).to(device, computed_in).eval()  # without dropout
        tokens.append(plain.token_losses(model, reader, numbers, spec.settings.objective.loss_mask))
        loss, sums = plain.gradients(model, reader, numbers, spec.settings.objective.loss_mask)
        losses.append(loss)
        norms.append(float(square_sum(sums.values(), device).sqrt()))
        save_file({name: gradient.cpu().contiguous() for name, gradient in sums.items()}, folder / file)
        del model, sums
    deviation = float((tokens[1] - tokens[0]).square().mean().sqrt()) / max(1, tokens[0].numel()) ** 0.5
    return _Reference(
        loss=losses[0], norm=norms[0], loss_noise=_DEVIATIONS * deviation, norm_noise=_NOISE * abs(norms[1] - norms[0])
    )


def _model(spec: RunSpec, vocabulary: int, dtype: torch.dtype, kernel: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {"dtype": dtype, "trust_remote_code": spec.settings.model.trust_remote_code}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(spec.base.folder, attn_implementation=kernel, **options)
    except ValueError:
        if kernel == "eager":
            raise
        model = AutoModelForCausalLM.from_pretrained(
            spec.base.folder, attn_implementation="eager", **options
        )  # Gemma 2 has only this one
    _grow(model, vocabulary)
    return model


def _grow(model: Any, vocabulary: int) -> None:
    """Extend the vocabulary as training does: new tokens start as the mean of the old ones."""
    held = model.get_input_embeddings().weight.size(0)
    if vocabulary <= held:
        return
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    means = [table.weight.detach().float().mean(0) for table in tables]
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    with torch.no_grad():
        for table, mean in zip([model.get_input_embeddings(), model.get_output_embeddings()], means, strict=True):
            table.weight[held:] = mean.to(table.weight.dtype)


def _own(file: Path, name: str, part: Any, offset: int, like: Tensor) -> Tensor:
    with safe_open(file, "pt") as content:
        whole = content.get_tensor(name)
    own = part.take(whole) if part is not None else whole
    stretch: Tensor = own.reshape(-1)[offset : offset + like.numel()]
    return stretch.to(like.device)


def _difference(ours: Tensor, theirs: Tensor, other: Tensor) -> Difference:
    pairs = (
        (ours, ours),
        (theirs, theirs),
        (ours, theirs),
        (ours - theirs, ours - theirs),
        (other - theirs, other - theirs),
    )
    a, b, product, distance, kernels = (float(one.double() @ two.double()) for one, two in pairs)
    return Difference(ours=a, theirs=b, product=product, distance=distance, other=kernels, count=ours.numel())


def _joined(everyone: Sequence[Mapping[str, Difference]]) -> dict[str, Difference]:
    """Join the pieces of each parameter, which different processes own."""
    joined: dict[str, Difference] = {}
    for found in everyone:
        for name, one in found.items():
            before = joined.get(name)
            sums = {key: value + (getattr(before, key) if before else 0) for key, value in vars(one).items()}
            joined[name] = Difference(**sums)
    return joined


def table(outcome: Outcome, spec: RunSpec) -> Sequence[str]:
    """Format the outcome as lines; parameters that differ most come first."""
    (loss, our_loss), (norm, our_norm) = outcome.losses, outcome.norms
    lines = [
        (
            f"{spec.base.entry.name}, {spec.layout}, {str(outcome.dtype).removeprefix('torch.')} on {outcome.device}, "
            f"{outcome.documents} documents"
        ),
        "",
    ]
    lines += [f"{'':>14}  {'transformers':>14}  {'here':>14}  {'difference':>10}  {'allowed':>10}"]
    lines += [
        f"{'loss':>14}  {loss:>14.8f}  {our_loss:>14.8f}  {abs(loss - our_loss):>10.1e}  {outcome.allowed_loss:>10.1e}"
    ]
    lines += [
        (
            f"{'gradient norm':>14}  {norm:>14.7f}  {our_norm:>14.7f}  {abs(norm - our_norm):>10.1e}  "
            f"{outcome.allowed_norm:>10.1e}"
        ),
        "",
    ]
    ordered = sorted(outcome.parameters, key=outcome.share, reverse=True)
    lines += [f"{'cosine':>10}  {'off by':>9}  gradient of (the {min(_SHOWN, len(ordered))} worst of {len(ordered)})"]
    for name in ordered[:_SHOWN]:
        one = outcome.parameters[name]
        lines += [f"{one.cosine:>10.7f}  {(one.distance / one.theirs) ** 0.5 if one.theirs else 0.0:>9.1e}  {name}"]
    wrong = [name for name in ordered if outcome.share(name) > 1]
    verdict = "the same" if outcome.is_equal else "NOT the same"
    more = f"; {len(wrong)} gradients are off by more" if wrong else ""
    return [*lines, "", f"{verdict} within what rounding explains{more}"]
