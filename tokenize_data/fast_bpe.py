"""A faster tokenizer for byte-level BPE vocabularies: tiktoken, built from the same merges.

It is used only where the shape of the tokenizer is one of those known here, and only after it gave the same ids on the
user's own texts. Ranks follow the order of the merges; a table leads from ranks to the vocabulary's ids.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tiktoken
from tokenizers import Tokenizer

from tokenize_data.byte_lengths import composer

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits(individual) before GPT-2's pattern: a digit ends the piece, so white space before it is matched as a whole.
_DIGITS_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
HARD_TEXTS = (
    "",
    " ",
    "  ",
    "\n",
    "\n\n",
    " \n ",
    "a  b   c",
    "tab\tand\r\nline",
    "it's we'LL I'M don't",
    "1234567890 3.14 1,000",
    "x  5 \n 7",
    "naïve café ﬁ Å",
    "e\u0301 n\u0303",
    "日本語のテキスト 中文",
    "🙂👩‍👩‍👧 ok",
    "ا ل ع",
    "\u200b\u00a0 \u3000x",
    "___---===",
    "ÿ\x7f\x01",
    "  \n\n  end  ",
    "<|im_start|>user\n",
    "²½Ⅷ ٣",
    "'S 's ’s",
)

_NO_TOKEN = np.iinfo(np.uint32).max  # a byte that the vocabulary lacks: the Hugging Face tokenizer drops it silently

Encode = Callable[[str], np.ndarray]


def build(pipeline: dict[str, Any]) -> Encode | None:
    """Build a function from text to ids; None for other kinds of tokenizers. `pipeline` is the content of
    tokenizer.json.
    """
    pattern = _pattern(pipeline["pre_tokenizer"])
    model, added = pipeline["model"], pipeline["added_tokens"]
    normal_form = _normal_form(pipeline["normalizer"])
    if normal_form and any(token["normalized"] or not token["content"].isascii() for token in added):
        # what is looked for in the composed text and what in the text as it stands would have to be kept apart
        return None
    if pattern is None or normal_form is None or not _is_plain_bpe(model) or not _added_are_simple(added):
        return None
    ranks, ids = _ranks(model)
    if ranks is None:
        return None
    special = {token["content"]: len(ids) + position for position, token in enumerate(added)}
    table = np.array(ids + [token["id"] for token in added], dtype=np.uint32)
    encoding = tiktoken.Encoding("fast", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    allowed = set(special)
    compose = composer(added) if normal_form else str
    has_gaps = bool((table == _NO_TOKEN).any())

    def encode(text: str) -> np.ndarray:
        found = table[encoding.encode_to_numpy(compose(text), allowed_special=allowed, disallowed_special=())]
        return found[found != _NO_TOKEN] if has_gaps else found

    return encode


def first_difference(encode: Encode, backend: Tokenizer, texts: Sequence[str]) -> str | None:
    """The first text for which fast and slow tokenizer give different ids; None if there is none."""
    slow = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    for text, encoding in zip(texts, slow, strict=True):
        if encode(text).tolist() != encoding.ids:
            return text
    return None


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    if not steps or steps[-1] is None or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    *before, byte_level = steps
    if not before:
        return _GPT2 if byte_level.get("use_regex", True) else None
    if len(before) > 1:
        return None
    step = before[0]
    if step["type"] == "Digits" and step["individual_digits"] and byte_level.get("use_regex", True):
        return _DIGITS_GPT2
    if (
        step["type"] == "Split"
        and step["behavior"] == "Isolated"
        and not step["invert"]
        and not byte_level.get("use_regex", True)
    ):
        pattern: str | None = step["pattern"].get("Regex")
        return pattern
    return None


def _normal_form(normalizer: dict[str, Any] | None) -> str | None:
    """The Unicode normal form ('' for none); None for an unknown normalizer."""
    if normalizer is None:
        return ""
    steps = normalizer.get("normalizers", [normalizer])
    return "NFC" if [step["type"] for step in steps] == ["NFC"] else ("" if not steps else None)


def _is_plain_bpe(model: dict[str, Any]) -> bool:
    return (
        model["type"] == "BPE"
        and not model.get("dropout")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and not model.get("byte_fallback")
    )


def _added_are_simple(added: list[dict[str, Any]]) -> bool:
    """Whether tiktoken can match the added tokens: literally, and none a prefix of another."""
    texts = sorted(token["content"] for token in added)
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added):
        return False
    return not any(after.startswith(before) for before, after in itertools.pairwise(texts))


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: character -> byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


def _ranks(model: dict[str, Any]) -> tuple[dict[bytes, int] | None, list[int]]:
    alphabet, vocabulary = byte_alphabet(), model["vocab"]

    def to_bytes(token: str) -> bytes:
        return bytes(alphabet[character] for character in token)

    ranks: dict[bytes, int] = {}
    ids: list[int] = []
    try:
        for character, byte in alphabet.items():
            ranks[bytes([byte])] = len(ids)
            ids.append(vocabulary.get(character, _NO_TOKEN))
        for merge in model["merges"]:
            left, right = merge if isinstance(merge, list) else merge.split(" ")
            piece = to_bytes(left + right)
            if piece not in ranks:
                ranks[piece] = len(ids)
                ids.append(vocabulary[left + right])
        if model.get("ignore_merges"):
            for token, identifier in vocabulary.items():
                if all(character in alphabet for character in token) and (piece := to_bytes(token)) not in ranks:
                    ranks[piece] = len(ids)
                    ids.append(identifier)
    except KeyError:  # a merge or a character that is not in the vocabulary
        return None, []
    return ranks, ids
