"""Matches the tensors of a Hugging Face folder with parameters, whichever release of transformers wrote it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch

from sft.model.slices import Slice
from sft.model.weights import WeightFiles, sizes_text, some_of
from tokenize_data.errors import UserError

# Buffers that older versions of transformers saved with the weights.
_BUFFERS = (r"(^|\.)inv_freq$", r"(^|\.)attention\.(masked_)?bias$")


def match_names(
    expected: Mapping[str, tuple[int, ...]],
    files: WeightFiles,
    *,
    base_prefix: str,
    tied: Mapping[str, str],
    ignore: Sequence[str],
    grown: Mapping[str, int],
    renames: Sequence[tuple[str, str]] = (),
) -> dict[str, str]:
    """Name in the files of each parameter of the whole model. `expected` has their shapes, of those in `grown` with all
    their rows.

    `tied` maps a head to its embedding; both get the name that is there. `ignore` are patterns of tensors that may be
    there unused, `renames` (pattern, replacement) from names in the files to those of the model.
    """
    found, extra = _pair(expected, files.names(), base_prefix, renames)
    for head, embedding in tied.items():
        spare = [name for name in extra if head in _spellings(name, base_prefix, renames)]
        extra = [name for name in extra if name not in spare]
        heads = [found[head]] if head in found else spare
        if embedding in found and heads and not _look_equal(files, found[embedding], heads[0]):
            raise UserError(
                f"{files.folder} says that head and embedding are one, but {heads[0]} and {found[embedding]} differ: "
                "set tie_word_embeddings to false in its config.json"
            )
        source = found.get(embedding) or next(iter(heads), None)
        found |= {name: source for name in (head, embedding) if source and name in expected}
    patterns = [re.compile(pattern) for pattern in (*_BUFFERS, *ignore)]
    extra = [name for name in extra if not any(pattern.search(name) for pattern in patterns)]
    _refuse_mismatches(expected, files, found, extra, grown)
    return found


def _pair(
    expected: Mapping[str, tuple[int, ...]], names: Sequence[str], base_prefix: str, renames: Sequence[tuple[str, str]]
) -> tuple[dict[str, str], list[str]]:
    """Returns ({model's name: files' name}, unmatched names). Exact matches take precedence over alternative
    spellings.
    """
    found = {name: name for name in names if name in expected}
    extra = []
    for name in names:
        if name in found:
            continue
        fitting = next(
            (other for other in _spellings(name, base_prefix, renames) if other in expected and other not in found),
            None,
        )
        if fitting is None:
            extra.append(name)
        else:
            found[fitting] = name
    return found, extra


def _spellings(name: str, base_prefix: str, renames: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Possible names in the model for a tensor in the files: transformers saves models with or without the prefix."""
    for plain in dict.fromkeys([name, *(re.sub(pattern, replacement, name) for pattern, replacement in renames)]):
        yield plain
        yield f"{base_prefix}.{plain}"
        yield plain.removeprefix(f"{base_prefix}.")


def _look_equal(files: WeightFiles, first: str, second: str) -> bool:
    """Compare a few rows: a head that was trained separately differs from its embedding in all of them."""
    shape = files.shape(first)
    if shape != files.shape(second):
        return False
    pieces = tuple((row, min(row + 16, shape[0])) for row in (0, shape[0] // 2))
    few = Slice(dim=0, pieces=pieces)
    return torch.equal(files.read(first, few, torch.float32), files.read(second, few, torch.float32))


def _refuse_mismatches(
    expected: Mapping[str, tuple[int, ...]],
    files: WeightFiles,
    found: Mapping[str, str],
    extra: Sequence[str],
    grown: Mapping[str, int],
) -> None:
    misshapen = []
    for name, in_files in found.items():
        shape, wanted = files.shape(in_files), expected[name]
        is_shorter = name in grown and shape[1:] == wanted[1:] and 0 < shape[0] <= wanted[0] == grown[name]
        if shape != wanted and not is_shorter:
            misshapen.append(f"{in_files} {sizes_text(shape)} instead of {sizes_text(wanted)}")
    whole_numbers = [in_files for in_files in found.values() if not files.is_floating(in_files)]
    problems = [
        ("missing", [f"{name} {sizes_text(shape)}" for name, shape in expected.items() if name not in found]),
        ("of another shape", misshapen),
        ("in it but not in the model", [f"{name} {sizes_text(files.shape(name))}" for name in extra]),
        ("quantised", whole_numbers),
    ]
    described = [f"{kind}: {some_of(names)}" for kind, names in problems if names]
    if described:
        remedy = (
            "the model that it was quantised from"
            if whole_numbers
            else "a folder whose config.json and weights belong together"
        )
        raise UserError(
            f"{files.folder} does not hold the weights of its model ({'; '.join(described)}): give {remedy}"
        )
