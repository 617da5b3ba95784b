"""One pipeline stage of one tensor-parallel rank: some of the model's blocks, the embedding before them if it is the
first, the head after them if it is the last.

kept_N are the places in a row whose next token is trained, targets_N those tokens, weights_N what each counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from sft.model import attention, collectives, dropout, matmul
from sft.model.collectives import TensorGroup
from sft.model.parts import Block, Parts, lengths_of

# Results that selective recomputation keeps: those that are expensive to compute. Norms, rotations and activations
# are computed again.
_KEPT_OPERATIONS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    *matmul.OPERATIONS,
    *attention.KERNELS,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


class Stage(nn.Module):
    """(ids or hidden states, positions) to (hidden states, positions), or, in the last stage, to hidden states
    alone.
    """

    def __init__(
        self, parts: Parts, layers: range, group: TensorGroup, *, sequence_parallel: bool, recompute: str
    ) -> None:
        super().__init__()
        self.embedding = parts.embedding if layers.start == 0 else None
        self.blocks = nn.ModuleList(parts.blocks[layers.start : layers.stop])
        self.head = parts.head if layers.stop == len(parts.blocks) else None
        self.rotary = parts.rotary
        self._group, self._sequence_parallel = group, sequence_parallel and group.size > 1
        self.run = _runner(recompute)
        self.row_lengths: Iterator[Sequence[int]] | None = None
        self.spare = nn.ParameterList()
        self.drops = False

    def expect(self, row_lengths: Iterable[Sequence[int]]) -> None:
        """Set the document lengths of the next rows. Without them a stage reads them from the positions, which
        synchronises with the device.
        """
        self.row_lengths = iter(row_lengths)

    def drop_with(self, keys: dropout.Keys) -> None:
        """Tell the stage that adapters have dropout, so that positions carry document keys."""
        self.drops = True
        for block in self.blocks:
            assert isinstance(block, Block)
            block.keys = keys

    def fill_up(self, device: torch.device) -> None:
        """Add a parameter without effect to a stage that trains nothing, so that its output requires gradients."""
        if not any(parameter.requires_grad for parameter in self.parameters()):
            self.spare.append(nn.Parameter(torch.zeros(1, device=device)))

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | Tensor:
        hidden_RTE, given_RT = inputs
        positions_RT, keys_T = dropout.decoded(given_RT) if self.drops else (given_RT, None)
        if self.embedding is not None:
            hidden_RTE = self.embedding(hidden_RTE, positions_RT)
            if self._sequence_parallel:
                hidden_RTE = collectives.split(hidden_RTE, self._group, -2)
        for parameter in self.spare:
            hidden_RTE = hidden_RTE + 0 * parameter.sum().to(hidden_RTE.dtype)
        lengths = lengths_of(positions_RT) if self.row_lengths is None else next(self.row_lengths)
        row = replace(self.rotary(positions_RT, hidden_RTE, lengths), keys_T=keys_T)
        for block in self.blocks:
            hidden_RTE = self.run(block, hidden_RTE, row)
        return hidden_RTE if self.head is not None else (hidden_RTE, given_RT)

    def logits(self, hidden_RTE: Tensor, kept_N: Tensor) -> Tensor:
        """Return logits_NV of the positions `kept_N`, with this rank's columns of the vocabulary."""
        assert self.head is not None
        return self.head.logits(self.before_logits(hidden_RTE, kept_N))

    def before_logits(self, hidden_RTE: Tensor, kept_N: Tensor) -> Tensor:
        """Return hidden_NE of the positions `kept_N`, the input of the head's matmul."""
        assert self.head is not None
        if self._sequence_parallel:
            hidden_RTE = collectives.enter_region(self.head.normalised(hidden_RTE), self._group, True)
            hidden_NE = hidden_RTE[0].index_select(0, kept_N)
        else:
            hidden_NE = self.head.normalised(hidden_RTE[:, :].index_select(1, kept_N))[0]
            if self._group.size > 1:
                hidden_NE = collectives.enter_region(hidden_NE, self._group, False)
        return hidden_NE


def _runner(recompute: str) -> Callable[..., Tensor]:
    """Return a function that runs a block and keeps all, some or none of its activations."""
    if recompute == "none":
        return lambda block, *arguments: block(*arguments)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if recompute == "selective":
        options["context_fn"] = partial(checkpoint.create_selective_checkpoint_contexts, list(_KEPT_OPERATIONS))

    def run(block: nn.Module, *arguments: Any) -> Tensor:
        if not torch.is_grad_enabled():
            result: Tensor = block(*arguments)
        else:
            result = checkpoint.checkpoint(block, *arguments, **options)
        return result

    return run
