"""How likely a model finds given answers: the training loss on them, in float32, and the likeliest of several.

ids_BT are padded on the right: nothing looks ahead, so padding changes nothing. kept_S are the places with a learnt
next token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenize_data.prompts import Encoded
from tokenize_data.rendered import ASSISTANT

_BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """The sum of an answer's negative log-likelihoods, and its number of tokens."""

    nll: float
    tokens: int


def answer_likelihoods(model: Any, documents: Sequence[Encoded]) -> Iterator[tuple[int, Likelihood]]:
    """Yield (document number, likelihood) in batches of similar length: the training loss before its mean."""
    ordered = sorted(range(len(documents)), key=lambda number: -len(documents[number].ids))
    while ordered:
        width = len(documents[ordered[0]].ids)
        batch, ordered = ordered[: max(1, _BATCH_TOKENS // width)], ordered[max(1, _BATCH_TOKENS // width) :]
        for number, nlls_N in zip(batch, _batch(model, [documents[number] for number in batch]), strict=True):
            yield number, Likelihood(nll=float(nlls_N.double().sum()), tokens=nlls_N.numel())


def candidate_likelihoods(model: Any, documents: Sequence[Encoded]) -> list[Likelihood]:
    """Likelihoods of several answers to one question. The common prefix is computed once."""
    shared = _shared_length(documents)
    if shared < 2:
        return [likelihood for _, likelihood in sorted(answer_likelihoods(model, documents), key=lambda pair: pair[0])]
    with torch.inference_mode():
        prefix_1T = torch.tensor(documents[0].ids[: shared - 1].astype(np.int64), device=model.device)[None]
        cache = model(input_ids=prefix_1T, use_cache=True, **_last_only(model)).past_key_values
        cache.batch_repeat_interleave(len(documents))
        rests = [document.ids[shared - 1 :].astype(np.int64) for document in documents]
        ids_BT = _padded_right([rest[:-1] for rest in rests], model.device)
        logits_BTV = model(input_ids=ids_BT, past_key_values=cache, use_cache=True).logits
        result = []
        for row, (document, rest) in enumerate(zip(documents, rests, strict=True)):
            learnt = torch.from_numpy(_trained(document)[shared:])
            targets_N = torch.from_numpy(rest[1:])[learnt].to(model.device)
            nll_N = _nll(logits_BTV[row, : len(rest) - 1][learnt.to(model.device)], targets_N)
            result.append(Likelihood(nll=float(nll_N.double().sum()), tokens=nll_N.numel()))
        return result


@torch.inference_mode()
def _batch(model: Any, documents: Sequence[Encoded]) -> list[Tensor]:
    """Return nll_N of each document's trained tokens."""
    ids_BT = _padded_right([document.ids.astype(np.int64) for document in documents], model.device)
    learnt_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for row, document in enumerate(documents):
        learnt_BT[row, : len(document.ids)] = torch.from_numpy(_trained(document))
    kept_S = learnt_BT.any(0)[1:].nonzero()[:, 0]
    mask_BT = torch.arange(ids_BT.size(1), device=model.device) < torch.tensor(
        [[len(d.ids)] for d in documents], device=model.device
    )
    choosing = "logits_to_keep" in inspect.signature(model.forward).parameters
    more = {"logits_to_keep": kept_S} if choosing else {}  # the head is expensive; most positions are prompt
    logits_BSV = model(input_ids=ids_BT[:, :-1], attention_mask=mask_BT[:, :-1].long(), use_cache=False, **more).logits
    logits_BSV = logits_BSV if choosing else logits_BSV[:, kept_S]
    found = []
    for row in range(len(documents)):
        here_S = learnt_BT[row, kept_S + 1]
        found.append(_nll(logits_BSV[row][here_S], ids_BT[row, kept_S[here_S] + 1]))
    return found


def _nll(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """As `sft.objective.likelihood` on one rank."""
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="none")


def _trained(document: Encoded) -> np.ndarray:
    """Which tokens are predicted and trained; a document's first token never is."""
    trained: np.ndarray = np.repeat(np.array(document.run_roles), document.run_lengths) == ASSISTANT
    trained[:1] = False
    return trained


def _shared_length(documents: Sequence[Encoded]) -> int:
    """The length of the common prefix, up to the first trained token of the last turn."""
    shortest = min(len(document.ids) for document in documents)
    ids = np.stack([document.ids[:shortest] for document in documents])
    differ = (ids != ids[0]).any(0)
    shared = int(differ.argmax()) if differ.any() else shortest - 1
    turn = len(documents[0].ids) - _last_turn(documents[0])
    return min(shared, turn)


def _last_turn(document: Encoded) -> int:
    """The number of tokens from the start of the last trained run to the end."""
    after = 0
    for length, role in zip(reversed(document.run_lengths), reversed(document.run_roles), strict=True):
        after += length
        if role == ASSISTANT:
            break
    return after


def _last_only(model: Any) -> dict[str, int]:
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _padded_right(rows: Sequence[np.ndarray], device: Any) -> Tensor:
    ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for place, ids in enumerate(rows):
        ids_BT[place, : len(ids)] = torch.from_numpy(ids)
    return ids_BT.to(device)
