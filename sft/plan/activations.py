"""What a decoder layer keeps for its backward pass, operation by operation, as its Hugging Face implementation
computes.

Numbers are bytes on one tensor rank for one row. Norms compute in float32: in bf16 they keep a float32 copy of their
input.
"""

from __future__ import annotations

from dataclasses import dataclass

from sft.families.architecture import Architecture
from sft.plan.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of one layer for one micro-batch."""

    whole: float  # without recomputation
    products: float  # with selective recomputation: the input, and the results of matmuls and attention
    boundary: float  # hidden states between layers
    scores: float  # temporarily, if whole attention scores are recomputed
    backward: float  # temporarily in the layer's backward pass: in its MLP, in the norm before it, or in its attention

    def kept(self, recompute: str) -> float:
        return {"none": self.whole, "selective": self.products, "full": self.boundary}[recompute]


def activations_of(
    model: Architecture, layout: Layout, tokens: int, each: int, *, longest: int | None = None, ranks: int | None = None
) -> Activations:
    """Activations for a row of `tokens`, with `each` bytes per number. `longest` is its longest document (None: the
    row is one document). `ranks` is the sum of a layer's adapter ranks, if only adapters are trained.
    """
    t, stretches = layout.tp, layout.tp if layout.sequence_parallel else 1
    shared = max(model.key_value_heads // t, 1)
    queries, keys = model.queries // t * tokens, shared * model.head_size * tokens
    inner = model.intermediate // t * tokens
    hidden, stretch = model.hidden * tokens, model.hidden * tokens // stretches
    logarithms = 4 * (model.heads // t) * tokens  # log-sum-exp of the softmax
    scores, again = _scores(model, t, tokens, min(longest or tokens, tokens), each)
    mlp = each * inner * (model.kept_inner or (4 if model.is_gated else 2))
    normed = (4 if model.widens_norms else each) if ranks is None else 0  # the input of a trained norm's weights
    low = each * (ranks or 0) * tokens
    whole = (
        _norms(model, hidden, stretch, each, normed)
        + _attention(model, queries, keys, each, normed)
        + logarithms
        + scores
        + mlp
        + low
    )
    products = (
        each * (stretch + 2 * queries + 2 * keys + (2 if model.is_gated else 1) * inner + 2 * hidden) + logarithms + low
    )
    backward = max(
        each * (hidden + 2 * inner), (5 * 4 + 5 * each) * stretch - mlp, _wide_scores(model, t, tokens, each) - mlp
    )
    return Activations(
        whole=whole, products=products, boundary=each * stretch, backward=backward, scores=max(0.0, again - mlp)
    )


def _norms(model: Architecture, hidden: int, stretch: int, each: int, normed: int) -> float:
    """Norms, each with the linear layers' input that follows."""
    if not model.is_rms:
        return model.num_norms * each * (stretch + hidden)
    return model.num_norms * ((4 + normed) * stretch + 8 * (stretch // model.hidden)) + 2 * each * hidden


def _attention(model: Architecture, queries: int, keys: int, each: int, normed: int) -> float:
    """Rotated queries and keys, values, and the result twice: as computed, and as the next layer reads it."""
    kept = each * (3 * queries + 2 * keys)
    if model.keeps_fused:
        kept += each * (queries + keys)
    if model.widens_scores:
        kept += (4 - each) * (queries + keys)
    return kept + ((4 + normed) * (queries + keys) if model.norms_heads else 0)


def _scores(model: Architecture, t: int, tokens: int, longest: int, each: int) -> tuple[float, float]:
    """(kept, temporary when recomputed) bytes of masks, and of scores without a fused kernel."""
    if model.widens_scores:  # probabilities, and a copy of them that multiplies the values
        return float(tokens * tokens) * (model.heads // t) * (4 + each % 4), 0.0
    if model.keeps_row_scores:
        pairs = float(tokens * tokens)
        return pairs * each * (max(model.heads // t, 1) + 1), pairs * 4 * max(model.heads // t, 1)
    pairs = float(tokens * longest)
    if model.attention_softcap:
        return pairs * (5 + 2 * each) * max(model.heads // t, 1), pairs * 4 * max(model.heads // t, 1)
    has_window = model.window is not None and model.window < longest
    return (pairs * each * model.window_share if has_window else 0.0), 0.0


def _wide_scores(model: Architecture, t: int, tokens: int, each: int) -> float:
    """The gradient of the probabilities and that of the scores. The 16-bit copy is gone by then."""
    return float(tokens * tokens) * (model.heads // t) * (2 * 4 - each % 4) if model.widens_scores else 0.0
