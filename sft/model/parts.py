"""What a pipeline stage is made of: the embedding, blocks, the head. Each takes and returns plain tensors.

ids_RT are token ids, positions_RT count from 0 in each document (R = 1 packed row, T tokens), hidden_RTE hidden states,
logits_RTV logits. The modules are the Hugging Face model's own; nothing is copied, so parameter names and objects are
theirs.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sft.families.family import Family
from sft.families.table import family_of
from sft.model.anatomy import Anatomy
from sft.model.attention import Documents, documents_of
from sft.model.dropout import Keys


class Embedding(nn.Module):
    """Ids to the first hidden states, by the model's own trunk without its layers, including scalings and learned
    positions.
    """

    def __init__(self, model: Any, anatomy: Anatomy) -> None:
        super().__init__()
        self.trunk = model.get_submodule(anatomy.trunk)
        for name in anatomy.final:
            setattr(self.trunk, name.rpartition(".")[2], None if name.endswith("project_out") else nn.Identity())
        setattr(self.trunk, anatomy.layers.rpartition(".")[2], nn.ModuleList())

    def forward(self, ids_RT: Tensor, positions_RT: Tensor) -> Tensor:
        hidden_RTE: Tensor = self.trunk(input_ids=ids_RT, position_ids=positions_RT, use_cache=False).last_hidden_state
        return hidden_RTE


@dataclass(frozen=True)
class Row:
    """What all blocks of a stage need to know about a packed row."""

    positions_RT: Tensor
    documents: Documents
    rotations: dict[str | None, Any]  # cosines and sines per kind of layer
    keys_T: Tensor | None = None  # document keys of the tokens, with dropout


class Rotary(nn.Module):
    """Rotary embeddings, computed once per row by a copy of the model's own, which stays in float32 when the model is
    cast.
    """

    def __init__(self, rotary: nn.Module | None, kinds: Sequence[str | None]) -> None:
        super().__init__()
        self._rotary = (copy.deepcopy(rotary),)  # in a tuple, so that it is not a submodule and not cast
        self._kinds = tuple(dict.fromkeys(kinds))

    def forward(self, positions_RT: Tensor, hidden_RTE: Tensor, lengths: Sequence[int]) -> Row:
        rotary, rotations = self._rotary[0], {}
        if rotary is not None:
            rotary.to(hidden_RTE.device)
            for kind in self._kinds:
                rotations[kind] = rotary(hidden_RTE, positions_RT, *([kind] if kind else []))
        return Row(positions_RT, documents_of(lengths, hidden_RTE), rotations)


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, layer: nn.Module, kind: str | None, family: Family) -> None:
        super().__init__()
        self.layer = layer
        self.kind = kind
        self.keys: Keys | None = None
        self.needs_mask, self._options = family.takes_row_mask, family.layer_options

    def forward(self, hidden_RTE: Tensor, row: Row) -> Tensor:
        if self.keys is not None:
            self.keys.current_T = row.keys_T
        options: dict[str, Any] = {"attention_mask": None, "position_ids": row.positions_RT, "use_cache": False}
        options |= self._options
        if self.kind in row.rotations:
            options["position_embeddings"] = row.rotations[self.kind]
        if self.needs_mask:
            options["attention_mask"] = block_diagonal_mask(row.documents.lengths, hidden_RTE)
        else:
            options["documents"] = row.documents
        output = self.layer(hidden_RTE, **options)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


class Head(nn.Module):
    """The last hidden states to logits."""

    def __init__(self, final: list[nn.Module], head: nn.Module, softcap: float | None, multiplier: float) -> None:
        super().__init__()
        self.final = nn.ModuleList(final)
        self.head = head
        self._softcap, self._multiplier = softcap, multiplier

    def forward(self, hidden_RTE: Tensor) -> Tensor:
        return self.logits(self.normalised(hidden_RTE))

    def normalised(self, hidden_RTE: Tensor) -> Tensor:
        for module in self.final:
            hidden_RTE = module(hidden_RTE)
        return hidden_RTE

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits for any leading shape: untrained tokens may have been removed."""
        logits: Tensor = self.head(hidden)
        if self._multiplier != 1.0:
            logits = logits * self._multiplier
        return torch.tanh(logits / self._softcap) * self._softcap if self._softcap else logits


@dataclass(frozen=True)
class Parts:
    """The parts of a whole model, from which stages are made."""

    embedding: Embedding
    rotary: Rotary
    blocks: list[Block]
    head: Head


def take_apart(model: Any, anatomy: Anatomy) -> Parts:
    """Take a model apart. The model itself is not usable afterwards."""
    kinds = anatomy.layer_types if anatomy.rotary_by_type else (None,) * anatomy.num_layers
    rotary = Rotary(model.get_submodule(anatomy.rotary) if anatomy.rotary else None, kinds)
    layers = list(model.get_submodule(anatomy.layers))
    family = family_of(model.config.model_type)
    blocks = [Block(layer, kind, family) for layer, kind in zip(layers, kinds, strict=True)]
    final = [model.get_submodule(name) for name in anatomy.final]
    head = Head(final, model.get_submodule(anatomy.head), anatomy.logit_softcap, anatomy.logit_multiplier)
    return Parts(Embedding(model, anatomy), rotary, blocks, head)


def lengths_of(positions_RT: Tensor) -> list[int]:
    """Document lengths of a packed row, from positions that restart at 0. Synchronises with the device."""
    starts = [*(positions_RT[0] == 0).nonzero().flatten().tolist(), positions_RT.size(1)]
    return [end - start for start, end in itertools.pairwise(starts)]


def block_diagonal_mask(document_lengths: Sequence[int], like: Tensor) -> Tensor:
    """mask_11TT: 0 where a token may attend, the smallest number elsewhere. For attention that is not aware of
    documents.
    """
    blocks = [torch.ones(length, length, dtype=torch.bool, device=like.device).tril() for length in document_lengths]
    allowed = torch.block_diag(*blocks).bool()
    mask = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill_(
        ~allowed, torch.finfo(like.dtype).min
    )
    return mask[None, None]
