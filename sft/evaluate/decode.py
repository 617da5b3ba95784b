"""Generates answers in batches of similar length with a KV cache; finished rows leave the batch. Greedy ids are those
of `generate`.

Rows are padded on the left, so all of them write at the right edge. prompt_BT are ids, mask_BT says which are real.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenize_data.errors import UserError

STOP, LENGTH, TOO_LONG = "stop", "length", "prompt too long"
_SHRINK_SHARE = 0.25  # finished rows are removed from the cache once this share is finished


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is sampled. Temperature 0 takes the most likely one."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 1234

    def __post_init__(self) -> None:
        for name, value, is_right, what in (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more"),
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("stop", self.stop, all(self.stop), "a text that is not empty"),
        ):
            if not is_right:
                raise UserError(f"--{name} {value} must be {what}")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row to answer. `number` seeds its sampling, so that an answer does not depend on the batch."""

    number: int
    ids: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Written:
    """The generated ids without the token that ended them."""

    number: int
    ids: list[int]
    finish: str


@dataclass
class _Row:
    prompt: Prompt
    generator: torch.Generator | None
    ids: list[int] = field(default_factory=list)


class Decoder:
    """Decodes with one model. `text_of` decodes ids to find stop texts; `on_token` receives each row's ids so far."""

    def __init__(
        self,
        model: Any,
        *,
        stop_ids: Sequence[int],
        text_of: Callable[[Sequence[int]], str],
        stop_texts: Sequence[str] = (),
        on_token: Callable[[int, list[int]], None] | None = None,
    ) -> None:
        self._model, self._text_of, self._on_token = model, text_of, on_token
        self._stop_ids, self._stop_texts = frozenset(stop_ids), tuple(stop_texts)
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._context = context_of(model.config)
        self.can_batch = all(_can_lose_rows(layer) for layer in self._new_cache().layers)

    def write(self, prompts: Sequence[Prompt], sampling: Sampling, batch_size: int) -> Iterator[Written]:
        """Generate answers, in the order in which they finish. The longest prompts come first, so that a lack of
        memory shows at once.
        """
        fitting = [prompt for prompt in prompts if len(prompt.ids) < self._context]
        for prompt in prompts:
            if len(prompt.ids) >= self._context:
                yield Written(number=prompt.number, ids=[], finish=TOO_LONG)
        size = batch_size if self.can_batch else 1
        ordered = sorted(fitting, key=lambda prompt: (-len(prompt.ids), prompt.number))
        for start in range(0, len(ordered), size):
            yield from self._batch(ordered[start : start + size], sampling)

    @torch.inference_mode()
    def _batch(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Written]:
        device = self._model.device
        rows = [_Row(prompt, _generator(sampling, prompt.number)) for prompt in prompts]
        alive = list(range(len(rows)))  # rows in the batch, which shrinks
        ids_BT, mask_BT = padded([prompt.ids for prompt in prompts], device)
        cache = self._new_cache()
        stops = (*sampling.stop, *self._stop_texts)
        done: set[int] = set()
        while True:
            logits_BV = self._forward(ids_BT, mask_BT, cache)
            next_B = _choose(logits_BV, [rows[index].generator for index in alive], sampling)
            for place, token in enumerate(next_B.tolist()):
                index = alive[place]
                if index in done:
                    continue
                finish = self._advance(rows[index], token, sampling, stops)
                if finish is not None:
                    done.add(index)
                    yield Written(number=rows[index].prompt.number, ids=rows[index].ids, finish=finish)
            kept = [place for place, index in enumerate(alive) if index not in done]
            if not kept:
                return
            ids_BT = next_B[:, None]
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(alive), 1)], 1)
            if len(alive) - len(kept) >= _SHRINK_SHARE * len(alive):
                kept_B = torch.tensor(kept, device=device)
                cache.batch_select_indices(kept_B)
                ids_BT, mask_BT, alive = ids_BT[kept_B], mask_BT[kept_B], [alive[place] for place in kept]

    def _forward(self, ids_BT: Tensor, mask_BT: Tensor, cache: Any) -> Tensor:
        """Return logits_BV of the next token, in float32."""
        further: dict[str, Any] = dict(self._last_only)
        if self._takes_positions:
            further["position_ids"] = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -ids_BT.size(1) :]
        output = self._model(input_ids=ids_BT, attention_mask=mask_BT, past_key_values=cache, use_cache=True, **further)
        logits_BV: Tensor = output.logits[:, -1].float()
        return logits_BV

    def _advance(self, row: _Row, token: int, sampling: Sampling, stops: Sequence[str]) -> str | None:
        """Add a token. Returns why the row has finished, or None."""
        if token in self._stop_ids:
            return STOP
        row.ids.append(token)
        if self._on_token is not None:
            self._on_token(row.prompt.number, row.ids)
        if stops:
            tail = self._text_of(row.ids[-max(map(len, stops)) - 8 :])
            if any(stop in tail for stop in stops):
                return STOP
        if len(row.ids) >= sampling.max_tokens or len(row.prompt.ids) + len(row.ids) >= self._context:
            return LENGTH
        return None

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop text."""
    return text[: min((found for stop in stops if (found := text.find(stop)) >= 0), default=len(text))]


def padded(rows: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Return ids_BT and mask_BT, padded on the left."""
    longest = max(map(len, rows))
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, ids in enumerate(rows):
        ids_BT[place, longest - len(ids) :] = torch.tensor(list(ids))
        mask_BT[place, longest - len(ids) :] = 1
    return ids_BT.to(device), mask_BT.to(device)


def context_of(config: Any) -> float:
    """The model's maximum number of positions."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else float("inf")


def _can_lose_rows(layer: Any) -> bool:
    """Whether finished rows can be removed from the cache: only if it has just keys and values."""
    from transformers.cache_utils import DynamicLayer

    return isinstance(layer, DynamicLayer) and not hasattr(layer, "update_conv_state")


def _generator(sampling: Sampling, number: int) -> torch.Generator | None:
    return torch.Generator().manual_seed(sampling.seed * 1_000_003 + number) if sampling.temperature > 0 else None


def _choose(logits_BV: Tensor, generators: Sequence[torch.Generator | None], sampling: Sampling) -> Tensor:
    """Choose ids_B of the next tokens."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    scaled_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < scaled_BV.size(-1):
        least_B1 = scaled_BV.topk(sampling.top_k).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < least_B1, -torch.inf)
    probabilities_BV = scaled_BV.softmax(-1)
    if sampling.top_p < 1:
        sorted_BV, order_BV = probabilities_BV.sort(descending=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV  # of the tokens before it: the first to reach top_p is kept
        kept_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(1, order_BV, before_BV < sampling.top_p)
        probabilities_BV = probabilities_BV.masked_fill(~kept_BV, 0.0)
    rows = [
        torch.multinomial(row.cpu(), 1, generator=generator)
        for row, generator in zip(probabilities_BV, generators, strict=True)
    ]
    return torch.cat(rows).to(logits_BV.device)
