"""The real tokenizer of unit tests, read and prepared once in a process instead of by every command: 1 s each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from tokenize_data import encode, fast_bpe, stage
from tokenize_data.byte_lengths import ByteLengths
from tokenize_data.tokenizer import load_tokenizer


@contextmanager
def loaded_once(folder: Path) -> Iterator[None]:
    """Commands of this process that ask for `folder` share its tokenizer. All others load theirs."""
    load, build, lengths_of, fast = stage.load_tokenizer, encode._build_fast, ByteLengths.of, fast_bpe.build

    @cache
    def shared() -> Any:
        return load_tokenizer(str(folder))

    @cache
    def shared_fast() -> Any:
        return build(shared())

    @cache
    def shared_lengths() -> Any:
        return lengths_of(shared())

    def is_shared(tokenizer: Any) -> bool:
        return bool(shared.cache_info().currsize) and tokenizer is shared()

    def built(tokenizer: Any) -> Any:
        is_as_always = is_shared(tokenizer) and fast_bpe.build is fast  # a test may have replaced it
        return shared_fast() if is_as_always else build(tokenizer)

    with (
        mock.patch.object(stage, "load_tokenizer", lambda path: shared() if path == str(folder) else load(path)),
        mock.patch.object(encode, "_build_fast", built),
        mock.patch.object(
            ByteLengths, "of", lambda tokenizer: shared_lengths() if is_shared(tokenizer) else lengths_of(tokenizer)
        ),
    ):
        yield
