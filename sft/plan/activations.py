"""What a decoder layer keeps for its backward pass, operation by operation, as its Hugging Face implementation computes.

Numbers are bytes on one tensor rank for one row. Norms compute in float32: in bf16 they keep a float32 copy of their input.
"""

from __future__ import annotations

from dataclasses import dataclass

from sft.plan.architecture import Architecture
from sft.plan.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Of one layer and one micro-batch."""

    whole: float  # without recomputation
    products: float  # with selective recomputation: its input, results of matrix products and attention
    boundary: float  # hidden states between layers
    backward: float  # for a moment besides, while the layer's backward pass computes: in its MLP, or in the norm before it

    def kept(self, recompute: str) -> float:
        return {"none": self.whole, "selective": self.products, "full": self.boundary}[recompute]


def activations_of(model: Architecture, layout: Layout, tokens: int, each: int, *, document_tokens: float | None = None) -> Activations:
    """For a row of `tokens`, with `each` bytes a number."""
    t, stretches = layout.tp, layout.tp if layout.sequence_parallel else 1
    shared = max(model.key_value_heads // t, 1)
    queries, keys = model.queries // t * tokens, shared * model.head_size * tokens
    inner = model.intermediate // t * tokens
    hidden, stretch = model.hidden * tokens, model.hidden * tokens // stretches
    norms = _norms(model, hidden, stretch, each)
    attention = _attention(model, queries, keys, each) + 4 * (model.heads // t) * tokens  # the softmax's logarithms
    mlp = each * inner * (4 if model.is_gated else 2)
    products = each * (stretch + 2 * queries + 2 * keys + (2 if model.is_gated else 1) * inner + 2 * hidden)
    products += 4 * (model.heads // t) * tokens
    backward = max(each * (hidden + 2 * inner), (5 * 4 + 5 * each) * stretch - mlp)
    return Activations(whole=norms + attention + mlp, products=products, boundary=each * stretch, backward=backward)


def _norms(model: Architecture, hidden: int, stretch: int, each: int) -> float:
    """Each with the linear layers' input behind it."""
    if not model.is_rms:
        return model.num_norms * each * (stretch + hidden)
    return model.num_norms * ((4 + each) * stretch + 8 * (stretch // model.hidden)) + 2 * each * hidden


def _attention(model: Architecture, queries: int, keys: int, each: int) -> float:
    """Queries and keys after their rotation, values, the result twice: as it comes, and as the next layer takes it."""
    kept = each * (3 * queries + 2 * keys)
    return kept + ((4 + 2 * each) * (queries + keys) if model.norms_heads else 0)
