"""What a model is made of: its linear layers, norms and embeddings, and how many weights each has.

Nothing is built, so a plan needs neither torch nor the weights.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer. Tensor ranks split its columns (outputs), heads (key-value heads) or rows (inputs)."""

    name: str
    inputs: int
    outputs: int
    split: str
    has_bias: bool = False

    @property
    def num_weights(self) -> int:
        return self.inputs * self.outputs + (self.outputs if self.has_bias else 0)

    def shape_on(self, tp: int, head_size: int) -> tuple[int, int]:
        """Return (inputs, outputs) on one tensor rank. Key-value heads are never cut: if there are too few, ranks share
        them.
        """
        if self.split == "rows":
            return self.inputs // tp, self.outputs
        least = min(head_size, self.outputs) if self.split == "heads" else 1
        return self.inputs, max(self.outputs // tp, least)

    def weights_on(self, tp: int, head_size: int) -> int:
        inputs, outputs = self.shape_on(tp, head_size)
        return inputs * outputs + (outputs if self.has_bias else 0)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The decoder layer, which is the same throughout, and what comes before and after the layers."""

    kind: str
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    is_tied: bool
    is_gated: bool
    linears: tuple[Linear, ...]  # of a layer
    num_norms: int  # over hidden states, in a layer
    norm_weights: int  # in a layer, the same on each tensor rank
    split_norm_weights: int = 0  # in a layer, split over tensor ranks
    norms_heads: bool = False  # queries and keys are normed too
    is_rms: bool = True
    has_final_norm: bool = True
    position_weights: int = 0
    embedding_size: int | None = None  # set if it differs from hidden, as in OPT-350m
    head_has_bias: bool = False
    attention_softcap: bool = False
    window: int | None = None  # how far a token looks back, in `window_share` of the layers
    window_share: float = 0.0
    is_known: bool = True
    # What layers keep for the backward pass, where they differ from Llama.
    widens_norms: bool = False  # norms multiply by their weight in float32
    keeps_fused: bool = False  # values are a view of the fused tensor, so all of it stays in memory
    kept_inner: int | None = None  # how many tensors of the MLP's inner size are kept
    keeps_row_scores: bool = False  # attention scores of the whole row, with a mask
    widens_scores: bool = False  # computes queries, keys and scores of the whole row in float32

    @property
    def layer_weights(self) -> int:
        return sum(linear.num_weights for linear in self.linears) + self.norm_weights + self.split_norm_weights

    @property
    def embedding_weights(self) -> int:
        """Weights of the first stage before its layers: token embedding, learned positions, OPT's input projection."""
        size = self.embedding_size or self.hidden
        return self.vocabulary * size + self.position_weights + (size * self.hidden if self.embedding_size else 0)

    @property
    def final_weights(self) -> int:
        """Weights of the last stage after its layers, without the head: final norm, OPT's output projection."""
        norm = (self.hidden if self.is_rms else 2 * self.hidden) if self.has_final_norm else 0
        return norm + (self.embedding_size * self.hidden if self.embedding_size else 0)

    @property
    def head_weights(self) -> int:
        return self.vocabulary * (self.embedding_size or self.hidden)

    @property
    def head_biases(self) -> int:
        return self.vocabulary if self.head_has_bias else 0

    @property
    def num_parameters(self) -> int:
        own_head = 0 if self.is_tied else self.head_weights
        return (
            self.layers * self.layer_weights + self.embedding_weights + self.final_weights + own_head + self.head_biases
        )

    @property
    def queries(self) -> int:
        return self.heads * self.head_size

    def layer_weights_on(self, tp: int) -> int:
        linears = sum(linear.weights_on(tp, self.head_size) for linear in self.linears)
        return linears + self.norm_weights + self.split_norm_weights // tp

    def vocabulary_on(self, tp: int) -> int:
        return -(-self.vocabulary // tp)
