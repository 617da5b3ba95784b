"""How many tokens' logits are computed at once: enough to keep the processor busy, and no more."""

from __future__ import annotations

_LOGITS_ON_GPU = 2**28  # numbers
_LOGITS_ON_CPU = 2**24


def tokens_at_once(columns: int, is_gpu: bool) -> int:
    """The number of tokens, for `columns` of the vocabulary on a rank."""
    return max(256, (_LOGITS_ON_GPU if is_gpu else _LOGITS_ON_CPU) // columns)
