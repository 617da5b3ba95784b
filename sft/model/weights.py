"""Weights of a Hugging Face folder, read slice by slice: a rank touches its own share of the files and holds one tensor
beside it.

In the order of use: WeightFiles opens a folder, `weight_names.match_names` finds each parameter in it (or says what is
wrong), load fills the parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sft.model.slices import Slice
from tokenize_data.errors import UserError, shorten

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATING = frozenset({"F64", "F32", "F16", "BF16"})
_PICKLES = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth")
_CHUNK_ELEMENTS = 16 * 2**20
# Pages that were read stay in this process's memory for as long as their file is mapped: it is mapped again after so
# many bytes.
_MAPPED_BYTES = 128 * 2**20


class WeightFiles:
    """The tensors of a folder's safetensors files, by name. Files are mapped on first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles: dict[Path, Any] = {}
        self._mapped: dict[Path, int] = {}
        self._file_of = self._find_files()

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(name).get_shape())

    def is_floating(self, name: str) -> bool:
        """False for what a quantised model is made of: its integers and 8-bit numbers mean nothing without their
        scales.
        """
        return self._open(name).get_dtype() in _FLOATING

    def read(self, name: str, part: Slice | None, dtype: torch.dtype) -> Tensor:
        """Read a part of one tensor to the CPU, with zeros as padding. Only the part's bytes are read."""
        shape = self.shape(name)
        tensor = torch.empty(part.shape_of(shape) if part else shape, dtype=dtype)
        self.read_into(tensor, name, part)
        return tensor

    def read_into(self, destination: Tensor, name: str, part: Slice | None) -> None:
        """Like `read`, into a tensor of any device and dtype."""
        shape = self.shape(name)
        assert tuple(destination.shape) == (part.shape_of(shape) if part else shape), (
            name,
            destination.shape,
            shape,
            part,
        )
        if part is None:
            destination.copy_(self._open(name)[...])
        else:
            if sum(stop - start for _, start, stop in part.spans(shape[part.dim])) < part.length:
                destination.zero_()
            for begin, start, stop in part.spans(shape[part.dim]):
                index = (slice(None),) * part.dim + (slice(start, stop),)
                destination.narrow(part.dim, begin, stop - start).copy_(self._open(name)[index])
        touched = part.length if part and part.dim == 0 else shape[0] if shape else 1
        self._forget_pages(name, touched * prod(shape[1:]))

    def row_mean(self, name: str) -> Tensor:
        """The mean over the first dimension, in float32, read in chunks; a tensor of the other dimensions."""
        shape = self.shape(name)
        step = max(1, _CHUNK_ELEMENTS // max(1, prod(shape[1:])))
        total = torch.zeros(
            shape[1:], dtype=torch.float64
        )  # so that neither threads nor chunks are to be seen in the float32
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            total += self.read(name, Slice(dim=0, pieces=((start, stop),)), torch.float32).sum(0, dtype=torch.float64)
        return (total / shape[0]).float()

    def _open(self, name: str) -> Any:
        file = self._file_of[name]
        handle = self._handles.get(file)
        if handle is None:
            handle = self._handles[file] = _open_file(file)
        try:
            return handle.get_slice(name)
        except SafetensorError as error:
            raise UserError(
                f"{file} does not hold {name}, which {INDEX} says it does: the folder mixes two models; fetch it again"
            ) from error

    def _forget_pages(self, name: str, num_elements: int) -> None:
        file = self._file_of[name]
        self._mapped[file] = self._mapped.get(file, 0) + num_elements * 4
        if self._mapped[file] > _MAPPED_BYTES:
            del self._mapped[file], self._handles[file]

    def _find_files(self) -> dict[str, Path]:
        single, index = self.folder / SINGLE, self.folder / INDEX
        if single.is_file():
            handle = self._handles[single] = _open_file(single)
            return dict.fromkeys(handle.keys(), single)
        if index.is_file():
            return self._read_index(index)
        raise self._why_unreadable()

    def _why_unreadable(self) -> UserError:
        pickle = next((file.name for pattern in _PICKLES for file in sorted(self.folder.glob(pattern))), None)
        if pickle is not None:
            return UserError(
                f"{self.folder} has {pickle} but no {SINGLE}: a pickle can run any program and is not read; convert "
                "it where you trust it: "
                f"python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{self.folder}')"
                f".save_pretrained('{self.folder}')\""
            )
        hint = (
            "it is an adapter: merge it into its base model first (sft merge)"
            if (self.folder / "adapter_config.json").exists()
            else ("give the folder of a Hugging Face model, as save_pretrained writes it")
        )
        return UserError(f"{self.folder} has neither {SINGLE} nor {INDEX}: {hint}")

    def _read_index(self, index: Path) -> dict[str, Path]:
        try:
            files = {
                str(name): self.folder / file for name, file in json.loads(index.read_bytes())["weight_map"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {shorten(error, 120)}"
            raise UserError(f"{index} is not an index of weights ({reason}): fetch it again") from error
        missing = sorted({file.name for file in files.values() if not file.is_file()})
        if missing:
            raise UserError(
                f"{index} names {some_of(missing)}, missing in {self.folder}: fetch the folder again, completely"
            )
        return files


def read_grown(files: WeightFiles, name: str, part: Slice | None, dtype: torch.dtype, rows: int) -> Tensor:
    """Like `WeightFiles.read` for a tensor with `rows` rows: missing rows are the mean of the existing ones."""
    whole = (rows, *files.shape(name)[1:])
    tensor = torch.zeros(part.shape_of(whole) if part else whole, dtype=dtype)
    _read_grown_into(tensor, files, name, part, rows)
    return tensor


def load(
    destinations: Mapping[str, tuple[nn.Parameter, Slice | None]],
    files: WeightFiles,
    names: Mapping[str, str],
    *,
    grown: Mapping[str, int] | None = None,
) -> None:
    """Load parameters in place, in their own dtype, one tensor at a time. `names` comes from `match_names`."""
    with torch.no_grad():
        for name, (parameter, part) in destinations.items():
            assert not parameter.is_meta, name
            rows = grown.get(name) if grown else None
            if rows is None:
                files.read_into(parameter.data, names[name], part)
            else:
                _read_grown_into(parameter.data, files, names[name], part, rows)


def _read_grown_into(destination: Tensor, files: WeightFiles, name: str, part: Slice | None, rows: int) -> None:
    held = files.shape(name)[0]
    assert rows >= held, (name, rows, held)
    if part is not None and part.dim == 0:
        files.read_into(destination, name, part)
        new = [(begin + max(held - start, 0), begin + stop - start) for begin, start, stop in part.spans(rows)]
    else:
        files.read_into(destination[:held], name, part)
        new = [(held, rows)]
    new = [(begin, end) for begin, end in new if begin < end]
    if not new:
        return
    mean = files.row_mean(name)
    if part is not None and part.dim > 0:
        mean = replace(part, dim=part.dim - 1).take(mean)
    for begin, end in new:
        destination[begin:end] = mean.to(destination)


def _open_file(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        size = f"{file.stat().st_size} bytes" if file.is_file() else "no file"
        reason = shorten(error, 120)
        raise UserError(
            f"{file} ({size}) is not a complete safetensors file ({reason}): fetch it again, completely"
        ) from error


def sizes_text(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def some_of(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
