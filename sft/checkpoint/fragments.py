"""The files of a checkpoint: flat slices of parameters as safetensors, from which any layout can read its parts. A
tensor's key is `<Hugging Face name>|<state>|<offset in the part>`; the file's metadata describe the part and the
whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sft.checkpoint.manifest import FileRecord, read_manifest
from sft.checkpoint.windows import Window, windows
from sft.model.slices import Slice
from tokenize_data.errors import UserError, shorten

_SMALLEST_BYTES, _LARGEST_BYTES = 32 * 2**20, 2 * 10**9
_FILES_A_RANK = 8  # several can be hashed in parallel
_WRITERS = 4  # files in parallel: one is hashed while another is written
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}
_CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Later:
    """Values computed when they are written, because their source is smaller or not in host memory."""

    num_elements: int
    dtype: torch.dtype
    make: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """A flat slice of a part of a tensor."""

    name: str
    state: str
    shape: tuple[int, ...]  # of the whole
    part: Slice | None  # None: the part is the whole
    offset: int
    values: Tensor | Later  # flat, on the CPU
    is_of_parameters_shape: bool = True  # factored moments have rows or columns of another shape

    @property
    def described_as(self) -> str:
        """The header's key for shape and part."""
        return self.name if self.is_of_parameters_shape else f"{self.name}|{self.state}"

    @property
    def key(self) -> str:
        return f"{self.name}|{self.state}|{self.offset}"

    @property
    def num_elements(self) -> int:
        return self.values.num_elements if isinstance(self.values, Later) else self.values.numel()

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.values.dtype.itemsize


def write_fragments(
    folder: Path, fragments: Sequence[Fragment], rank: int, world: int, limit_bytes: int | None = None
) -> list[FileRecord]:
    """Write files of at most `limit_bytes` (a larger fragment gets its own file) and sync them to disk."""
    limit_bytes = limit_bytes or _limit(sum(fragment.num_bytes for fragment in fragments))
    files = list(_filled(fragments, limit_bytes))
    suffixes = ["", *(f"-{number}" for number in range(1, len(files)))]
    paths = [folder / f"rank-{rank:05d}-of-{world:05d}{suffix}.safetensors" for suffix in suffixes]
    with ThreadPoolExecutor(_WRITERS) as pool:
        return list(pool.map(_write_file, paths, files))


def _limit(num_bytes: int) -> int:
    return max(_SMALLEST_BYTES, min(_LARGEST_BYTES, -(-num_bytes // _FILES_A_RANK)))


def _filled(fragments: Sequence[Fragment], limit_bytes: int) -> Iterator[list[Fragment]]:
    waiting: list[Fragment] = []
    size = 0
    for fragment in fragments:
        if waiting and size + fragment.num_bytes > limit_bytes:
            yield waiting
            waiting, size = [], 0
        waiting.append(fragment)
        size += fragment.num_bytes
    if waiting:
        yield waiting


def _reserve(handle: int, num_bytes: int) -> None:
    """Reserve space, so that a full disk is noticed now and leaves room for metrics and status."""
    try:
        os.posix_fallocate(handle, 0, num_bytes)
    except AttributeError:
        return  # not supported on this system
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise  # other errors: the file system cannot reserve space


def _write_file(path: Path, fragments: Sequence[Fragment]) -> FileRecord:
    """Write a safetensors file ourselves, to hash it on the way, report the system's errors, and map no memory."""
    digest = hashlib.sha256()
    with path.open("xb", buffering=0) as file:
        _reserve(file.fileno(), sum(fragment.num_bytes for fragment in fragments))
        for chunk in _chunks(fragments):
            digest.update(chunk)
            written = 0
            while written < len(chunk):
                written += file.write(chunk[written:]) or 0
        os.fsync(file.fileno())
        return {"name": path.name, "bytes": file.tell(), "sha256": digest.hexdigest()}


def _chunks(fragments: Sequence[Fragment]) -> Iterator[memoryview]:
    parts = {fragment.described_as: (fragment.shape, fragment.part) for fragment in fragments}
    assert all(parts[fragment.described_as] == (fragment.shape, fragment.part) for fragment in fragments), (
        "a rank has one part of each"
    )
    described = {
        name: {"shape": shape, "part": part and {"dim": part.dim, "pieces": part.pieces}}
        for name, (shape, part) in parts.items()
    }
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "parts": json.dumps(described)}}
    end = 0
    for fragment in fragments:
        assert fragment.key not in header, fragment.key
        stop = end + fragment.num_bytes
        header[fragment.key] = {
            "dtype": _DTYPES[fragment.values.dtype],
            "shape": [fragment.num_elements],
            "data_offsets": [end, stop],
        }
        end = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for fragment in fragments:
        values = fragment.values.make() if isinstance(fragment.values, Later) else fragment.values
        assert (values.dim(), values.numel(), values.device.type) == (1, fragment.num_elements, "cpu"), fragment.key
        data = values.view(torch.uint8).numpy().data
        for start in range(0, len(data), _CHUNK_BYTES):
            yield data[start : start + _CHUNK_BYTES]


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """A fragment in a file."""

    file: Any
    key: str
    dtype: torch.dtype
    part: Slice | None
    offset: int
    length: int

    def read(self, start: int, stop: int) -> Tensor:
        tensor: Tensor = self.file.get_slice(self.key)[start:stop]
        return tensor


class Checkpoint:
    """A committed checkpoint. Tensors are assembled from fragments of any layout; opening it reads only the headers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._shapes_of_states: dict[tuple[str, str], tuple[int, ...]] = {}  # shapes that differ from the parameter's
        self._stored: dict[tuple[str, str], list[_Stored]] = {}
        for record in self.manifest["files"]:
            path = folder / record["name"]
            try:
                self._note(safe_open(path, "pt"))
            except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
                raise UserError(f"{path} is damaged ({shorten(error, 120)}): take another checkpoint") from error

    @property
    def iteration(self) -> int:
        return int(self.manifest["iteration"])

    def names(self) -> list[str]:
        return list(self._shapes)

    def states(self) -> list[str]:
        return [str(state) for state in self.manifest["states"]]

    def whole_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, state: str, part: Slice | None = None) -> Tensor:
        """Read a part of a tensor, or all of it. Padding beyond the whole is zero."""
        shape = self._shape_of(name, state)
        if part is not None:
            shape = part.shape_of(shape)
        return self.read_stretch(name, state, part, 0, prod(shape)).view(shape)

    def read_stretch(self, name: str, state: str, part: Slice | None, start: int, stop: int) -> Tensor:
        """Read [start, stop) of a flat part, and little else."""
        stored = self._stored.get((name, state), [])
        result = torch.empty(stop - start, dtype=stored[0].dtype if stored else torch.float32)
        self.read_into(result, name, state, part, start)
        return result

    def read_into(self, result: Tensor, name: str, state: str, part: Slice | None, start: int) -> None:
        """Read a slice of a flat part, from `start`, into `result`, which may have another dtype or be on a GPU."""
        stored, shape, stop = self._stored.get((name, state), []), self._shape_of(name, state), start + result.numel()
        dims = {at.part.dim for at in stored if at.part is not None} | ({part.dim} if part is not None else set())
        if len(dims) > 1:  # sliced differently from when it was written
            assert part is not None
            result.copy_(part.take(self.read(name, state)).flatten()[start:stop])
            return
        dim = next(iter(dims), 0)
        wanted = list(windows(shape, dim, part, start, stop))
        missing = sum(window.size for window in wanted)
        if missing < result.numel():
            result.zero_()  # padding beyond the whole
        for at in stored:
            missing -= _copy_common(
                result, wanted, at, list(windows(shape, dim, at.part, at.offset, at.offset + at.length))
            )
        if missing:
            raise UserError(f"{self.folder} lacks {missing} of the values of {name} ({state}): take another checkpoint")

    def _shape_of(self, name: str, state: str) -> tuple[int, ...]:
        return self._shapes_of_states.get((name, state)) or self._shapes[name]

    def _note(self, file: Any) -> None:
        parts = json.loads(file.metadata()["parts"])
        for key in file.keys():  # noqa: SIM118  # safetensors' file is no mapping
            name, state, offset = key.split("|")
            own = parts.get(f"{name}|{state}")
            described = own or parts[name]
            shape = tuple(int(size) for size in described["shape"])
            part = _part_of(described["part"])
            given = file.get_slice(key)
            (length,), dtype = given.get_shape(), _TORCH_DTYPES[given.get_dtype()]
            if (
                self._shapes_of_states.setdefault((name, state), shape) if own else self._shapes.setdefault(name, shape)
            ) != shape:
                raise ValueError(f"{name} has two shapes")
            if not 0 <= int(offset) <= int(offset) + length <= prod(part.shape_of(shape) if part else shape):
                raise ValueError(f"{key} lies outside of its part")
            stored = _Stored(file=file, key=key, dtype=dtype, part=part, offset=int(offset), length=length)
            self._stored.setdefault((name, state), []).append(stored)


def _part_of(given: Any) -> Slice | None:
    return (
        None
        if given is None
        else Slice(dim=int(given["dim"]), pieces=tuple((int(start), int(stop)) for start, stop in given["pieces"]))
    )


def _copy_common(result: Tensor, wanted: Sequence[Window], at: _Stored, given: Sequence[Window]) -> int:
    """Copy the overlap of a stored fragment with the requested range. Returns the number of elements."""
    pairs = [
        (to, source) for one in wanted for other in given if (to := one.common(other)) and (source := other.common(one))
    ]
    if not pairs:
        return 0
    begin, end = min(source.offset for _, source in pairs), max(source.end for _, source in pairs)
    values = at.read(begin, end)
    for to, source in pairs:
        to.of(result).copy_(source.of(values, begin))
    return sum(to.size for to, _ in pairs)
