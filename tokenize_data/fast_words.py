"""A faster tokenizer for SentencePiece-like BPE vocabularies: each word once, then from a cache.

These vocabularies write a space as "▁" and have no token in which a "▁" follows another character, so no merge ever
reaches across the beginning of a word: words can be tokenised one by one, and most words of a text have been seen
before. The same holds for line breaks where no token joins one to another character. Like the other fast tokenizer it
is used only after it gave the same ids on the user's texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from tokenizers import Tokenizer

_SPACE = "\u2581"
_MOST_WORDS = 1 << 18
_LONGEST_KEPT = 64  # characters; longer words are rare, and rarely repeated

Encode = Callable[[str], np.ndarray]


def build(pipeline: dict[str, Any], backend: Tokenizer) -> Encode | None:
    """Build a function from text to ids; None for other kinds of tokenizers."""
    prefix = _prefix(pipeline)
    words = _words(pipeline["model"])
    if prefix is None or words is None or not _added_are_simple(pipeline["added_tokens"]):
        return None
    special = {token["content"]: np.uint32(token["id"]).tobytes() for token in pipeline["added_tokens"]}
    parts = (
        re.compile("(" + "|".join(re.escape(text) for text in sorted(special, key=len, reverse=True)) + ")")
        if special
        else None
    )
    cache = _WordCache(backend)

    def encode(text: str) -> np.ndarray:
        pieces: list[bytes] = []
        for part in parts.split(text) if parts else (text,):
            if part in special:
                pieces.append(special[part])
            elif part:
                pieces += cache.lookup(words.findall(prefix + part.replace(" ", _SPACE)))
        return np.frombuffer(b"".join(pieces), dtype=np.uint32)

    return encode


class _WordCache:
    """A cache from words to the bytes of their ids."""

    def __init__(self, backend: Tokenizer) -> None:
        self._model = backend.model
        self._known: dict[str, bytes] = {}

    def lookup(self, words: list[str]) -> list[bytes]:
        try:
            return list(map(self._known.__getitem__, words))
        except KeyError:
            return [self._known.get(word) or self._learn(word) for word in words]

    def _learn(self, word: str) -> bytes:
        ids = np.array([token.id for token in self._model.tokenize(word)], dtype=np.uint32).tobytes()
        if len(word) <= _LONGEST_KEPT:
            if len(self._known) >= _MOST_WORDS:
                self._known.clear()
            self._known[word] = ids
        return ids


def _prefix(pipeline: dict[str, Any]) -> str | None:
    """The prefix of each piece of text between added tokens; None for an unknown normalisation."""
    normalizer, pre_tokenizer = pipeline["normalizer"], pipeline["pre_tokenizer"]
    if pre_tokenizer is not None and not (
        pre_tokenizer["type"] == "Split" and pre_tokenizer["pattern"] == {"String": " "}
    ):
        return None  # a split at spaces finds none: they are "▁" by then
    steps = (normalizer or {}).get("normalizers", [normalizer])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if steps == [replace]:
        return ""
    return _SPACE if steps == [{"type": "Prepend", "prepend": _SPACE}, replace] else None


def _words(model: dict[str, Any]) -> re.Pattern[str] | None:
    """The pattern whose matches can be tokenised separately; None if there is none."""
    vocabulary = model.get("vocab", {})
    if model["type"] != "BPE" or model.get("dropout") or not model.get("byte_fallback") or model.get("ignore_merges"):
        return None
    if any(f"<0x{byte:02X}>" not in vocabulary for byte in range(256)) or any(
        _SPACE in token.lstrip(_SPACE) for token in vocabulary
    ):
        return None
    lines_stand_alone = not any("\n" in token and token.strip("\n") for token in vocabulary)
    return re.compile(
        f"\n+|{_SPACE}*[^{_SPACE}\n]+|{_SPACE}+" if lines_stand_alone else f"{_SPACE}*[^{_SPACE}]+|{_SPACE}+"
    )


def _added_are_simple(added: list[dict[str, Any]]) -> bool:
    return not any(token["lstrip"] or token["rstrip"] or token["single_word"] or token["normalized"] for token in added)
