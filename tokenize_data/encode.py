"""Text with spans to token ids with roles.

A token's place in the text comes from a table of token lengths in bytes: added up, they must give the length of each
piece of the text, else this text is done again with the tokenizer's own offsets. Where the model begins to write, the
text is split before it is tokenised, so the ids before that place are exactly those of the prompt at generation time.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tokenizers import Tokenizer

from tokenize_data import fast_bpe, fast_words, guard
from tokenize_data.byte_lengths import ByteLengths
from tokenize_data.errors import RowError, shorten
from tokenize_data.rendered import ASSISTANT, Rendered
from tokenize_data.tokenizer import BaseTokenizer

_ANCHORS = ("\n", "0", ".", "\x01")  # a text after which tokens do not merge with what follows
_CHECK_EVERY = 128  # every n-th document is checked against the slow tokenizer


class FastPathError(Exception):
    """The fast tokenizer gave different ids, so its work is repeated without it."""


@dataclass(frozen=True)
class Encoded:
    """One document: ids, and runs of tokens with one role."""

    ids: np.ndarray
    run_lengths: list[int]
    run_roles: list[int]

    @property
    def trained(self) -> int:
        """The number of trained tokens; a document's first token is never predicted."""
        total = sum(n for n, role in zip(self.run_lengths, self.run_roles, strict=True) if role == ASSISTANT)
        return total - (1 if self.run_roles and self.run_roles[0] == ASSISTANT else 0)

    def cut(self, limit: int) -> Encoded:
        lengths, left = [], limit
        for length in self.run_lengths:
            lengths.append(min(length, left))
            left -= lengths[-1]
            if left == 0:
                break
        return Encoded(self.ids[:limit], lengths, self.run_roles[: len(lengths)])


class Encoder:
    """Encodes with one tokenizer. `fast` uses a faster implementation if the tokenizer's kind allows it."""

    def __init__(self, tokenizer: BaseTokenizer, fast: bool = True) -> None:
        self._backend = backend = tokenizer.backend
        self._fast = _build_fast(tokenizer) if fast else None
        self._pipeline = tokenizer.pipeline
        self._lengths = ByteLengths.of(tokenizer)
        self._splits_texts = self._lengths.prefix == "none"  # other tokenizers would insert a space before each piece
        self._is_added = np.zeros(len(self._lengths.table), dtype=bool)
        self._is_added[list(backend.get_added_tokens_decoder())] = True
        self._count = 0

    @property
    def is_fast(self) -> bool:
        return self._fast is not None

    def prove(self, texts: Sequence[str]) -> str | None:
        """Compare fast and slow on these texts and some hard ones. Returns None if equal, else the text, and disables
        fast.
        """
        if self._fast is None:
            return None
        fast, texts = self._fast, [*texts, *fast_bpe.HARD_TEXTS]
        # Catch whatever either tokenizer does with untrusted regular expressions.
        limits = guard.Limits(
            seconds=60 + sum(map(len, texts)) // 20_000, num_bytes=(4 << 30) + 400 * sum(map(len, texts))
        )
        child = guard.Child(lambda _: json.dumps(fast_bpe.first_difference(fast, self._backend, texts)), limits)
        try:
            different: str | None = json.loads(child.ask(None))
        except guard.LimitError as error:
            different = f"(the comparison {error})"
        finally:
            child.close()
        if different is not None:
            self._fast = None
        return different

    def encode(self, documents: Sequence[Rendered]) -> list[Encoded | RowError]:
        """Encode documents, in order."""
        try:
            return self._encode(documents)
        except BaseException as error:
            if type(error) is not Exception and not guard.is_panic(error):  # the type that `tokenizers` raises
                raise
            if len(documents) > 1:
                return [encoded for document in documents for encoded in self.encode([document])]
            return [
                RowError(
                    f"the tokenizer fails on this text ({shorten(error, 100)}): change the row, or use another "
                    "base model"
                )
            ]

    def _encode(self, documents: Sequence[Rendered]) -> list[Encoded | RowError]:
        if not self._lengths.is_known:
            return [self._by_offsets(document) for document in documents]
        if self._splits_texts:
            pieces = [piece for document in documents for piece in _split(document)]
            counts = [len(document.splits) + 1 for document in documents]
        else:
            pieces = [document.text for document in documents]
            counts = [1] * len(documents)
        if self._fast is not None:
            ids = [self._quickly(piece) for piece in pieces]
            self._spot_check(pieces, ids)
        else:
            encodings = self._backend.encode_batch_fast(pieces, add_special_tokens=False)
            ids = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        results: list[Encoded | RowError] = []
        at = 0
        for document, count in zip(documents, counts, strict=True):
            results.append(self._one(document, ids[at : at + count]))
            at += count
        return results

    def _quickly(self, piece: str) -> np.ndarray:
        assert self._fast is not None
        try:
            return self._fast(piece)
        except BaseException as error:
            if guard.is_panic(error) or isinstance(error, ValueError):  # a regular expression that goes too deep
                raise FastPathError(piece) from error
            raise

    def _spot_check(self, pieces: list[str], ids: list[np.ndarray]) -> None:
        due = range(-self._count % _CHECK_EVERY, len(pieces), _CHECK_EVERY)
        self._count += len(pieces)
        for index, slow in zip(
            due, self._backend.encode_batch_fast([pieces[i] for i in due], add_special_tokens=False), strict=True
        ):
            if ids[index].tolist() != slow.ids:
                raise FastPathError(pieces[index])

    def _one(self, document: Rendered, ids: list[np.ndarray]) -> Encoded | RowError:
        tokens = ids[0] if len(ids) == 1 else np.concatenate(ids)
        known = self._lengths
        if known.unknown is not None and (tokens == known.unknown).any():
            return self._by_offsets(document)
        lengths = known.table[tokens]
        if known.prefix != "none":
            lengths = lengths - self._added_prefixes(tokens)
        edges = [*document.splits, len(document.text)]
        places = known.places(document.text, [*document.starts, *edges], document.splits if self._splits_texts else ())
        if places is None:
            return self._by_offsets(document)
        ends = lengths.cumsum()
        counts = itertools.accumulate(map(len, ids))
        if any(
            (ends[count - 1] if count else 0) != places[edge]
            for count, edge in zip(counts, edges[-len(ids) :], strict=True)
        ):
            return self._by_offsets(document)
        starts = ends - lengths
        if (
            not self._splits_texts
            and not np.isin([places[split] for split in document.splits], np.append(starts, places[edges[-1]])).all()
        ):
            return self._by_offsets(document)
        return _with_runs(
            tokens, np.searchsorted(starts, [places[start] for start in document.starts]).tolist(), document.roles
        )

    def _added_prefixes(self, tokens: np.ndarray) -> np.ndarray:
        """1 if a token starts with a space that the tokenizer inserted."""
        added = self._is_added[tokens]
        starts = np.zeros(len(tokens), dtype=np.int64)
        if len(tokens):
            starts[0] = not added[0]
            if self._lengths.prefix == "always":
                starts[1:] = added[:-1] & ~added[1:]
        return starts

    @cached_property
    def _placing(self) -> Tokenizer:
        """The tokenizer with offsets that say where a token begins: some post-processors take a token's leading spaces
        out of them.
        """
        if "'trim_offsets': True" not in str(self._pipeline.get("post_processor")):
            return self._backend
        plain = Tokenizer.from_str(self._backend.to_str())
        plain.post_processor = None
        return plain

    def _by_offsets(self, document: Rendered) -> Encoded | RowError:
        pieces = _split(document) if self._splits_texts else [document.text]
        tokens: list[int] = []
        starts: list[int] = []
        at = 0
        for piece in pieces:
            encoding = self._placing.encode(piece, add_special_tokens=False)
            tokens += encoding.ids
            starts += [at + start for start, _ in encoding.offsets]
            at += len(piece)
        if not self._splits_texts:
            for split in document.splits:
                index = int(np.searchsorted(starts, split))
                ends_before = index == 0 or encoding.offsets[index - 1][1] <= split
                if not ends_before or (index < len(starts) and starts[index] != split and index > 0):
                    return self._respecting_splits(document)
        return _with_runs(
            np.array(tokens, dtype=np.uint32), np.searchsorted(starts, document.starts).tolist(), document.roles
        )

    def _respecting_splits(self, document: Rendered) -> Encoded | RowError:
        """For tokenizers that put a space before a text: pieces after the first stand behind an anchor that keeps it
        away.
        """
        tokens: list[int] = []
        starts: list[int] = []
        at = 0
        for number, piece in enumerate(_split(document)):
            kept = self._behind_anchor(piece) if number else self._tokens_with_starts(piece)
            if kept is None:
                joint = shorten(document.text[at - 12 : at + 12])
                return RowError(
                    f"the tokenizer joins the prompt's end with the answer's beginning ({joint}), and cannot be split "
                    "there: "
                    "begin the answer without white space, or use another --template"
                )
            tokens += [token for token, _ in kept]
            starts += [at + start for _, start in kept]
            at += len(piece)
        return _with_runs(
            np.array(tokens, dtype=np.uint32), np.searchsorted(starts, document.starts).tolist(), document.roles
        )

    def _tokens_with_starts(self, text: str) -> list[tuple[int, int]]:
        encoding = self._placing.encode(text, add_special_tokens=False)
        return [(token, start) for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)]

    def _behind_anchor(self, piece: str) -> list[tuple[int, int]] | None:
        """The tokens of a piece with no space put before it. Where no token reaches across, the two sides do not
        influence each other.
        """
        for anchor in _ANCHORS:
            encoding = self._placing.encode(anchor + piece, add_special_tokens=False)
            if all(start >= 1 or end <= 1 for start, end in encoding.offsets):
                pairs = zip(encoding.ids, encoding.offsets, strict=True)
                return [(token, start - 1) for token, (start, _) in pairs if start >= 1]
        return None


def _build_fast(tokenizer: BaseTokenizer) -> fast_bpe.Encode | None:
    try:
        return fast_bpe.build(tokenizer.pipeline) or fast_words.build(tokenizer.pipeline, tokenizer.backend)
    except BaseException as error:
        if guard.is_panic(error) or isinstance(
            error, ValueError
        ):  # a regular expression that the fast tokenizer does not know
            return None
        raise


def _split(document: Rendered) -> list[str]:
    edges = [0, *document.splits, len(document.text)]
    return [document.text[start:end] for start, end in itertools.pairwise(edges)]


def _with_runs(tokens: np.ndarray, positions: list[int], roles: list[int]) -> Encoded:
    lengths: list[int] = []
    kept: list[int] = []
    positions = [*positions, len(tokens)]
    for index, role in enumerate(roles):
        length = positions[index + 1] - positions[index]
        if length <= 0:
            continue
        if kept and kept[-1] == role:
            lengths[-1] += length
        else:
            lengths.append(length)
            kept.append(role)
    return Encoded(tokens, lengths, kept)
