"""Layers compiled by torch.compile: fewer and larger kernels, the same numbers up to rounding.

Blocks are compiled, not the whole stage: all blocks of a kind share one graph, whatever documents a row holds. Before
training, one block of each kind is run compiled and not compiled on a made-up row; where compiling fails, or gives
something else, the stage runs as it was written.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from sft.model import attention
from sft.model.parts import Block, Rotary, Row
from sft.model.stage import Stage

Run = Callable[[Block, Tensor, Row], Tensor]

_FAILURES = (TorchDynamoException, FailOnRecompileLimitHit)
_LENGTHS = (37, 91)
_CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}  # relative to a tensor's norm
_NOISE = 4.0  # or this multiple of the eager layer's own rounding error
_GRAPHS = 32  # graphs for kinds of layers, with and without gradients; more than torch's default


class CompiledRun:
    """Runs blocks compiled. After a failed compilation it runs them eagerly: later rows may need another compilation,
    and a failure must not end the run.
    """

    def __init__(self, as_written: Run, backend: Any, on_failure: Callable[[str], None]) -> None:
        self._as_written, self._on_failure, self._has_failed = as_written, on_failure, False
        self.compiled: Run = torch.compile(as_written, dynamic=True, fullgraph=True, backend=backend)

    def __call__(self, block: Block, hidden_RTE: Tensor, row: Row) -> Tensor:
        if self._has_failed:
            return self._as_written(block, hidden_RTE, row)
        try:
            return self.compiled(block, hidden_RTE, row)
        except _FAILURES as error:
            self._has_failed = True
            self._on_failure(f"layers are not compiled any more, which is slower: {_one_line(error)}")
            return self._as_written(block, hidden_RTE, row)


def compile_blocks(
    stage: Stage,
    config: Any,
    device: torch.device,
    backend: Any = "inductor",
    on_failure: Callable[[str], None] = lambda text: None,
) -> str | None:
    """Compile the blocks of `stage`, whose weights are loaded. Returns None, or why they stay eager. `on_failure`
    receives later failures.
    """
    blocks = [block for block in stage.blocks if isinstance(block, Block)]
    if not blocks:
        return None
    if blocks[0].needs_mask or not attention.runs_together(config):
        return "its attention computes a row's documents one by one, and would be compiled for each number of them"
    _keep_graphs()
    run = CompiledRun(stage.run, backend, on_failure)
    for block in _one_of_each_kind(blocks):
        trained = partial(_trained_on_a_row, rotary=stage.rotary, hidden_size=config.hidden_size, device=device)
        try:
            expected, found = trained(stage.run, block), trained(run.compiled, block)
            reason = _difference(found, expected, partial(_exact, trained, stage.run, block))
        except Exception as error:  # errors of Dynamo, Inductor, or a missing C compiler
            reason = _one_line(error)
        if reason is not None:
            return reason
    stage.run = run
    return None


def _one_of_each_kind(blocks: Sequence[Block]) -> list[Block]:
    """One block per kind: layers with and without a window have different graphs."""
    kinds = {(block.kind, getattr(block.layer, "attention_type", None), type(block.layer)): block for block in blocks}
    return list(kinds.values())


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _keep_graphs() -> None:
    """Raise torch's limit of 8 graphs per function, which some models exceed."""
    limits: Any = torch._dynamo.config
    limits.cache_size_limit = max(limits.cache_size_limit, _GRAPHS)


def _trained_on_a_row(
    run: Run, block: Block, *, rotary: Rotary, hidden_size: int, device: torch.device, rounded_as: Block | None = None
) -> list[Tensor]:
    """A block's output and gradients on a row of two documents, with inputs in the precision of `rounded_as`."""
    weights = [parameter for parameter in block.parameters() if parameter.requires_grad]
    given_in, dtype = (_format(one) for one in (rounded_as or block, block))
    generator = torch.Generator(device).manual_seed(0)
    hidden_RTE = torch.randn(1, sum(_LENGTHS), hidden_size, generator=generator, device=device).to(given_in).to(dtype)
    seed_RTE = torch.randn(hidden_RTE.shape, generator=generator, device=device).to(given_in).to(dtype)
    hidden_RTE.requires_grad_()
    positions_RT = torch.cat([torch.arange(length, device=device) for length in _LENGTHS])[None]
    with torch.enable_grad():
        output_RTE = run(block, hidden_RTE, rotary(positions_RT, hidden_RTE, _LENGTHS))
        gradients = torch.autograd.grad(output_RTE, [hidden_RTE, *weights], seed_RTE, allow_unused=True)
    return [output_RTE.detach(), *(gradient for gradient in gradients if gradient is not None)]


def _format(block: Block) -> torch.dtype:
    return next(parameter.dtype for parameter in block.parameters() if parameter.is_floating_point())


def _exact(trained: Callable[..., list[Tensor]], run: Run, block: Block) -> list[Tensor]:
    """The same from a float32 copy of the block."""
    return trained(run, copy.deepcopy(block).float(), rounded_as=block)


def _difference(
    found: Sequence[Tensor], expected: Sequence[Tensor], exact: Callable[[], Sequence[Tensor]]
) -> str | None:
    """Describe compiled results that differ by more than rounding. Gradients that are mostly rounding are compared
    with the `exact` ones.
    """
    if len(found) != len(expected):
        return "compiled layers compute other gradients"
    far = [number for number, pair in enumerate(zip(found, expected, strict=True)) if _share(*pair) > 1]
    truth = exact() if far else ()
    for number in far:
        rounding = _distance(expected[number], truth[number])
        if not _distance(found[number], truth[number]) <= _NOISE * rounding:
            size = max(float(expected[number].double().norm()), 1e-30)
            off = _distance(found[number], expected[number]) / size
            return f"compiled layers compute other values, off by {off:.1e} of its size"
    return None


def _share(found: Tensor, expected: Tensor) -> float:
    """The difference relative to the tolerance."""
    allowed = _CLOSE[expected.dtype] * float(expected.double().norm())
    distance = _distance(found, expected)
    return distance / allowed if allowed else float(distance > 0) * 2


def _distance(one: Tensor, other: Tensor) -> float:
    distance = float((one.double() - other.double()).norm())
    return distance if math.isfinite(distance) else math.inf
