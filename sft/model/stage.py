"""One pipeline stage of one tensor-parallel rank: some of the model's blocks, the embedding before them if it is the
first, the head after them if it is the last.

kept_N are the places in a row whose next token is trained, targets_N those tokens, weights_N what each counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from sft.model import attention, collectives, dropout, loss, products
from sft.model.collectives import TensorGroup
from sft.model.parts import Block, Parts
from sft.plan.chunks import tokens_at_once

# Results that selective recomputation keeps: what is dear to compute. Norms, rotations and activations are computed
# again.
_KEPT_OPERATIONS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    *products.OPERATIONS,
    attention.TOGETHER,
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
        self._run = _runner(recompute)
        self.spare = nn.ParameterList()
        self.drops = False

    def drop_with(self, keys: dropout.Keys) -> None:
        """Adapters in this stage have dropout: positions come with keys."""
        self.drops = True
        for block in self.blocks:
            assert isinstance(block, Block)
            block.keys = keys

    def fill_up(self, device: torch.device) -> None:
        """A stage that trains nothing still passes gradients on: a parameter that changes nothing makes its output ask
        for them.
        """
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
        row = replace(self.rotary(positions_RT, hidden_RTE), keys_T=keys_T)
        for block in self.blocks:
            hidden_RTE = self._run(block, hidden_RTE, row)
        return hidden_RTE if self.head is not None else (hidden_RTE, given_RT)

    def logits(self, hidden_RTE: Tensor, kept_N: Tensor) -> Tensor:
        """logits_NV of the places `kept_N` alone: this rank's columns of the vocabulary."""
        assert self.head is not None
        return self.head.logits(self.before_logits(hidden_RTE, kept_N))

    def before_logits(self, hidden_RTE: Tensor, kept_N: Tensor) -> Tensor:
        """hidden_NE of the places `kept_N`, for the head's last product."""
        assert self.head is not None
        if self._sequence_parallel:
            hidden_RTE = collectives.enter_region(self.head.normalised(hidden_RTE), self._group, True)
            hidden_NE = hidden_RTE[0].index_select(0, kept_N)
        else:
            hidden_NE = self.head.normalised(hidden_RTE[:, :].index_select(1, kept_N))[0]
            if self._group.size > 1:
                hidden_NE = collectives.enter_region(hidden_NE, self._group, False)
        return hidden_NE


class Loss:
    """What the last stage computes of a micro-batch: sum(weight * nll) * scale. While validating, counts are kept as
    well.
    """

    def __init__(self, stage: Stage, vocabulary_size: int, group: TensorGroup, at_once: int | None = None) -> None:
        """Logits are made of `at_once` tokens at a time: None, as many as memory has room for."""
        self._stage, self._vocabulary_size, self._group = stage, vocabulary_size, group
        self.at_once = at_once
        self.counts = torch.zeros(4, dtype=torch.float64)  # weighted nll, weight, tokens predicted right, tokens
        self.losses: list[
            Tensor
        ] = []  # of the micro-batches since `losses` was cleared last, for naming one that is not a number

    def __call__(self, hidden_RTE: Tensor, labels: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        kept_N, targets_N, weights_N, scale = labels
        head = self._stage.head
        assert head is not None
        hidden_NE = self._stage.before_logits(hidden_RTE, kept_N)
        at_once = self.at_once or tokens_at_once(-(-self._vocabulary_size // self._group.size), hidden_NE.is_cuda)
        if self._stage.training:
            trained = [parameter for parameter in head.head.parameters() if parameter.requires_grad]
            weighted = loss.weighted_sum(self._measure, trained, hidden_NE, targets_N, weights_N, at_once)
        else:
            chunks = zip(*(t.split(at_once) for t in (hidden_NE, targets_N, weights_N)), strict=True)
            weighted = torch.stack([self._counted(*chunk) for chunk in chunks]).sum()
        result = weighted * scale[0]
        self.losses.append(result.detach())
        return result

    def _measure(self, hidden_NE: Tensor, targets_N: Tensor) -> Tensor:
        assert self._stage.head is not None
        return loss.negative_log_likelihood(
            self._stage.head.logits(hidden_NE), targets_N, self._vocabulary_size, self._group
        )

    def _counted(self, hidden_NE: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
        assert self._stage.head is not None
        logits_NV = self._stage.head.logits(hidden_NE)
        nll_N = loss.negative_log_likelihood(logits_NV, targets_N, self._vocabulary_size, self._group)
        self._count(logits_NV, targets_N, weights_N, nll_N)
        return (nll_N * weights_N).sum()

    def _count(self, logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor, nll_N: Tensor) -> None:
        right_N = loss.most_likely(logits_NV, self._vocabulary_size, self._group) == targets_N
        fully_N = weights_N == 1  # answers: what is weighed less only helps the loss along
        counts = [
            (nll_N.double() * weights_N).sum(),
            weights_N.double().sum(),
            (right_N & fully_N).sum(),
            fully_N.sum(),
        ]
        self.counts += torch.stack([count.double().cpu() for count in counts])


def _runner(recompute: str) -> Callable[..., Tensor]:
    """How a block is run: keeping its activations, some of them, or none."""
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
