"""How many bytes of a text each token stands for, and for which texts that can be relied on.

Token lengths that add up to the length of the text give every token's place. They can also add up by chance, where one
change of the text makes up for another. So each change that makes a text longer is known here: composing (NFC) is
repeated, and what cannot be followed is not measured at all.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import normalizers

from tokenize_data.tokenizer import BaseTokenizer

_SPACE = "\u2581"
Compose = Callable[[str], str]


@dataclass(frozen=True, kw_only=True)
class ByteLengths:
    """Byte lengths of one tokenizer's tokens."""

    table: np.ndarray  # id -> bytes
    prefix: str  # where the tokenizer inserts a space: 'none', 'first' piece or 'always'
    is_known: bool  # False: the tokenizer changes texts in an unknown way, so lengths cannot be used
    unknown: int | None  # the id of unknown text
    compose: Compose | None  # the tokenizer's normalisation, apart from spaces

    @classmethod
    def of(cls, tokenizer: BaseTokenizer) -> ByteLengths:
        pipeline = tokenizer.pipeline
        steps = _steps(pipeline["normalizer"], "normalizers")
        composes = [step["type"] for step in steps] == ["NFC"]
        unknown = pipeline["model"].get("unk_token", pipeline["model"].get("unk_id"))
        return cls(
            table=_table(tokenizer),
            prefix=_prefix_rule(pipeline),
            is_known=_is_known(pipeline["model"]) and (composes or all(map(_changes_spaces_only, steps))),
            unknown=tokenizer.backend.token_to_id(unknown) if isinstance(unknown, str) else unknown,
            compose=composer(pipeline["added_tokens"]) if composes else None,
        )

    def places(self, text: str, cuts: Sequence[int], splits: Sequence[int]) -> dict[int, int] | None:
        """Character -> byte in what the tokenizer makes of the text, for each cut; None where it joins what a cut would
        part.

        Texts between splits are tokenised on their own.
        """
        if text.isascii():
            return {cut: cut for cut in cuts}
        places, total = {0: 0}, 0
        for start, end in itertools.pairwise(sorted({0, *splits, len(text)})):
            inside = sorted({start, end, *(cut for cut in cuts if start < cut < end)})
            stretches = [text[a:b] for a, b in itertools.pairwise(inside)]
            if self.compose is not None:
                stretches = [self.compose(stretch) for stretch in stretches]
                if len(stretches) > 1 and "".join(stretches) != self.compose(text[start:end]):
                    return None
            for place, stretch in zip(inside[1:], stretches, strict=True):
                total += len(stretch.encode())
                places[place] = total
        return places


def composer(added: Sequence[dict[str, Any]]) -> Compose:
    """NFC as `tokenizers` does it: added tokens are taken out first, so no mark melts with their last character."""
    verbatim = sorted((token["content"] for token in added if not token["normalized"]), key=len, reverse=True)
    parts = re.compile("(" + "|".join(map(re.escape, verbatim)) + ")") if verbatim else None
    form = normalizers.NFC()  # its tables, as those of Python's unicodedata may be of another Unicode version

    def compose(text: str) -> str:
        if text.isascii():
            return text
        if parts is None:
            return str(form.normalize_str(text))
        return "".join(
            part if number % 2 else form.normalize_str(part) for number, part in enumerate(parts.split(text))
        )

    return compose


def _steps(described: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if described is None:
        return []
    return [step for part in described[inner] for step in _steps(part, inner)] if inner in described else [described]


def _changes_spaces_only(step: dict[str, Any]) -> bool:
    """Whether the normalizer only replaces spaces, or inserts one before the text."""
    if step["type"] == "Replace":
        return bool(step["pattern"] == {"String": " "} and step["content"] == _SPACE)
    return step["type"] == "Prepend" and step["prepend"] in (_SPACE, " ")


def _is_known(model: dict[str, Any]) -> bool:
    """Whether a token's text is the document's, without markers for continued or ended words."""
    signs = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    return model["type"] in ("BPE", "Unigram") and not signs


def _table(tokenizer: BaseTokenizer) -> np.ndarray:
    backend, pipeline = tokenizer.backend, tokenizer.pipeline
    described = json.dumps([pipeline["normalizer"], pipeline["pre_tokenizer"]])
    byte_level = '"ByteLevel"' in described
    fallback = bool(pipeline["model"].get("byte_fallback"))
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    table = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, identifier in vocabulary.items():
        if identifier in added:
            table[identifier] = len(added[identifier].content.encode())
        elif byte_level:
            table[identifier] = len(token)
        elif fallback and len(token) == 6 and token.startswith("<0x"):
            table[identifier] = 1
        else:
            table[identifier] = len(token.replace(_SPACE, " ").encode())
    return table


def _prefix_rule(pipeline: dict[str, Any]) -> str:
    if any(step["type"] == "Prepend" for step in _steps(pipeline["normalizer"], "normalizers")):
        return "always"
    for step in _steps(pipeline["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return str(step.get("prepend_scheme", "always"))
        if step["type"] == "ByteLevel" and step.get("add_prefix_space"):
            return "always"
    return "none"
