"""Attention within each document of a packed row, as a function that transformers calls in place of its own.

Shapes: query_BHTD, key_BGTD, value_BGTD with B = 1 row, H query heads, G key-value heads, T tokens, D head size. There
is no mask to build: a document is a slice. Where torch has a kernel that takes all slices at once, on a GPU in 16 bits,
that is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

varlen_attn: Any = None
KERNELS: tuple[Any, ...] = ()  # expensive enough for selective recomputation to keep their results
if torch.backends.cuda.is_built():  # elsewhere it is never called, and its import would slow the start of every process
    from torch.nn.attention import varlen

    varlen_attn, KERNELS = varlen.varlen_attn, (torch.ops.torch_attn._varlen_attn.default,)
_LARGEST_HEAD, _HEAD_STEP = 256, 8  # that this kernel takes
# Since torch 2.12, fewer key-value heads than query heads must be announced.
_ASKS_FOR_GROUPS = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters
NAME = "sft_packed"
# What an attention module may pass on without changing the result of a causal, dropout-free forward pass.
_HARMLESS = frozenset({"position_ids", "use_cache", "output_attentions", "cache_position", "layer_idx"})


@dataclass(frozen=True)
class Documents:
    """The documents of a packed row. Compiled layers depend on `bounds` and `longest` alone, which may change without
    another compilation.
    """

    lengths: Sequence[int]  # they add up to the row's tokens
    longest: int
    bounds: Tensor | None  # where each document starts and the last one ends, if a kernel needs it


def documents_of(lengths: Sequence[int], like: Tensor) -> Documents:
    """The documents of a row with hidden states like `like`."""
    return Documents(lengths=lengths, longest=max(lengths), bounds=_bounds_of(lengths, like))


def packed_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: Documents,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **further: Any,
) -> tuple[Tensor, None]:
    """Returns (output_BTHD, None), as transformers' attention functions do."""
    unknown = [name for name, value in further.items() if value is not None and name not in _HARMLESS]
    if unknown or dropout:
        raise NotImplementedError(f"attention with {', '.join(unknown) or 'dropout'}")
    if documents.bounds is not None and softcap is None and has_kernel(query_BHTD.size(-1)):
        together = _together(
            query_BHTD, key_BGTD, value_BGTD, documents.bounds, documents.longest, scaling, sliding_window
        )
        return together, None
    slices = zip(*(t.split(list(documents.lengths), 2) for t in (query_BHTD, key_BGTD, value_BGTD)), strict=True)
    outputs = [_one_document(q, k, v, scaling, sliding_window, softcap) for q, k, v in slices]
    return torch.cat(outputs, 2).transpose(1, 2), None


def has_kernel(head_size: int) -> bool:
    """Whether the kernel for all documents at once supports this head size."""
    return head_size <= _LARGEST_HEAD and head_size % _HEAD_STEP == 0


def runs_together(config: Any) -> bool:
    """Whether a model with this configuration computes all documents of a row at once."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return has_kernel(head_size) and getattr(config, "attn_logit_softcapping", None) is None


def _bounds_of(lengths: Sequence[int], like: Tensor) -> Tensor | None:
    if like.device.type != "cuda" or like.dtype not in (torch.bfloat16, torch.float16):
        return None
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).pin_memory().to(like.device, non_blocking=True)


def _together(
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    bounds: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Compute output_BTHD of all documents in one call."""
    query_THD, key_TGD, value_TGD = (t[0].transpose(0, 1) for t in (query_BHTD, key_BGTD, value_BGTD))
    options: dict[str, Any] = {"enable_gqa": query_THD.size(1) != key_TGD.size(1)} if _ASKS_FOR_GROUPS else {}
    back = -1 if window is None or window >= longest else window - 1  # a window counts the token itself
    output_THD: Any = varlen_attn(
        query_THD, key_TGD, value_TGD, bounds, bounds, longest, longest, scale=scaling, window_size=(back, 0), **options
    )
    output_BTHD: Tensor = output_THD[None]
    return output_BTHD


def _one_document(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    length = query.size(2)
    grouped = query.size(1) != key.size(1)
    if softcap is not None:
        return _softcapped(query, key, value, scaling, window, softcap)
    if window is None or window >= length:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=_band(length, window, query), scale=scaling, enable_gqa=grouped
    )


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, softcap: float
) -> Tensor:
    """Attention with softcapped scores, as in Gemma 2, which no fused kernel of torch supports."""
    groups = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.size(-1) ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    length = query.size(2)
    scores = scores.masked_fill(~_band(length, window or length, query), torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype) @ value


def _band(length: int, window: int, like: Tensor) -> Tensor:
    """True where token i may attend to token j: i - window < j <= i."""
    ones = torch.ones(length, length, dtype=torch.bool, device=like.device)
    return ones.tril() & ones.triu(1 - window)


AttentionInterface.register(NAME, packed_attention)
