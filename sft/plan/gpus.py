"""The table of GPUs that plans use, the user's own entries, and the kind of a device.

Rates are those of the data sheets (dense bf16; links and networks in one direction). `*_efficiency` is the share of a
rate that large operations reach in practice: the only numbers here that come from measured runs, one set for all runs
on a kind of GPU.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tokenize_data.errors import UserError

GB = 2**30  # bytes, as GPUs count memory
_MAY_BE_ZERO = ("reserved_gb", "spare", "communicator_gb")
_MIG_SLICES = 7  # share of a whole GPU's processors


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU, or an instance of a partitioned one (MIG), where `index` is the GPU's."""

    index: int
    name: str  # the driver's name
    uuid: str | None = None
    memory_gb: float | None = None
    is_partitioned: bool = False
    is_instance: bool = False


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Memory in GB (2^30 bytes), as CUDA reports it: a little less than a GPU's name says. Rates in TFLOP/s and GB/s
    (10^9 bytes).
    """

    name: str
    memory_gb: float
    bf16_tflops: float
    memory_gbps: float
    link_gbps: float  # between GPUs in a node
    network_gbps: float  # one GPU's share of a node's bandwidth to others
    fp32_tflops: float = 19.5
    gpus_per_node: int = 8
    matrix_efficiency: float = 0.75
    memory_efficiency: float = 0.75
    link_efficiency: float = 0.75
    network_efficiency: float = 0.8
    reserved_gb: float = 1.0  # the CUDA context, loaded kernels, workspaces of cuBLAS
    spare: float = 0.03  # share of memory kept free for fragmentation and what a plan does not know
    communicator_gb: float = 0.5  # buffers of one of NCCL's communicators over NVLink (nccl issues 864, 964)

    def withheld_gb(self, communicators: int) -> float:
        """Memory that is not available for tensors."""
        return self.reserved_gb + self.spare * self.memory_gb + self.communicator_gb * communicators

    def usable_bytes(self, communicators: int) -> int:
        return int((self.memory_gb - self.withheld_gb(communicators)) * GB)


def _gpu(
    name: str,
    memory_gb: float,
    bf16: float,
    memory_gbps: float,
    link: float,
    network: float,
    efficiency: float,
    fp32: float = 19.5,
    reserved_gb: float = 1.0,
) -> Gpu:
    return Gpu(
        name=name,
        memory_gb=memory_gb,
        bf16_tflops=bf16,
        memory_gbps=memory_gbps,
        link_gbps=link,
        network_gbps=network,
        matrix_efficiency=efficiency,
        fp32_tflops=fp32,
        reserved_gb=reserved_gb,
        communicator_gb=0.5 if link >= 100 else 0.2,
    )


# Efficiencies of the A100 and the H100 come from published runs (benchmarks/published.py); the others have their
# generation's.
_AMPERE, _HOPPER = 0.83, 0.63
TABLE: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40gb", 39.4, 312, 1555, 300, 25, _AMPERE),
        _gpu("a100-80gb", 79.1, 312, 2039, 300, 25, _AMPERE),
        _gpu("h100-80gb", 79.1, 989, 3350, 450, 50, _HOPPER, 67),
        _gpu("h100-pcie-80gb", 79.1, 756, 2000, 50, 25, _HOPPER, 51),
        _gpu("h200-141gb", 139.7, 989, 4800, 450, 50, _HOPPER, 67),
        _gpu("gh200-96gb", 94.4, 989, 4000, 450, 50, _HOPPER, 67),
        _gpu("b200-180gb", 178, 2250, 7700, 900, 50, _HOPPER, 75),
        _gpu("a10g-24gb", 22.0, 70, 600, 25, 6, _AMPERE, 31, 0.8),
        _gpu("a40-48gb", 44.3, 150, 696, 50, 12.5, _AMPERE, 37, 0.8),
        _gpu("a6000-48gb", 47.4, 155, 768, 50, 12.5, _AMPERE, 39, 0.8),
        _gpu("l4-24gb", 21.9, 121, 300, 25, 12.5, 0.6, 30, 0.8),
        _gpu("l40s-48gb", 44.3, 362, 864, 25, 25, 0.6, 92, 0.8),
        _gpu("rtx3090-24gb", 23.6, 71, 936, 25, 6, _AMPERE, 36, 0.8),
        _gpu("rtx4090-24gb", 23.6, 165, 1008, 25, 6, _AMPERE, 83, 0.8),
    )
}


def find_gpu(name: str, table: dict[str, Gpu] | None = None) -> Gpu:
    """Find a GPU by its name in the table or a prefix (`h100`), in any case."""
    table = TABLE if table is None else table
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    if wanted in table:
        return table[wanted]
    largest = max(
        (key for key in table if key.startswith(f"{wanted}-")),
        key=lambda key: (table[key].memory_gb, -len(key)),
        default=None,
    )
    if largest is not None:
        return table[largest]
    close = difflib.get_close_matches(wanted, table, n=1)
    hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(sorted(table))}."
    raise UserError(f"--gpu {name} is not in the table: {hint} Another one can be described in a file: --gpu_file")


def read_gpus(file: Path) -> dict[str, Gpu]:
    """Read the user's GPUs from TOML, one table each. `like = "h100-80gb"` fills in what an entry leaves out."""
    try:
        content = tomllib.loads(file.read_text())
    except OSError as error:
        raise UserError(
            f"--gpu_file {file}: {error.strerror}: give the path of a TOML file with a table for each GPU"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid TOML: {error}") from error
    table = dict(TABLE)
    for name, entry in content.items():
        if not isinstance(entry, dict):
            raise UserError(f"{file}: {name} = {entry!r} is outside of a table: begin one with [{name}-80gb]")
        table[name.lower()] = _read_entry(file, name, entry, table)
    return table


def _read_entry(file: Path, name: str, entry: dict[str, Any], table: dict[str, Gpu]) -> Gpu:
    keys = {field.name for field in fields(Gpu)} - {"name"}
    values: dict[str, Any] = {}
    if "like" in entry:
        like = find_gpu(str(entry["like"]), table)
        values = {key: getattr(like, key) for key in keys}
    for key, value in entry.items():
        if key == "like":
            continue
        if key not in keys:
            close = difflib.get_close_matches(key, keys, n=1)
            raise UserError(
                f"{file}: [{name}] has an unknown key '{key}'" + (f": did you mean '{close[0]}'?" if close else "")
            )
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or value < 0
            or (value == 0 and key not in _MAY_BE_ZERO)
        ):
            raise UserError(f"{file}: [{name}] {key} = {value!r} must be a number above 0")
        values[key] = value
    missing = [
        key for key in ("memory_gb", "bf16_tflops", "memory_gbps", "link_gbps", "network_gbps") if key not in values
    ]
    if missing:
        raise UserError(
            f"{file}: [{name}] lacks {', '.join(missing)}: give them, or `like` with the name of a GPU in the table"
        )
    return Gpu(name=name.lower(), **values)


def plan_for(device: Device, table: dict[str, Gpu]) -> Gpu | None:
    """The kind of GPU to plan for. A MIG instance has its share of memory and rates."""
    whole, _, share = device.name.partition(" MIG ")
    gpu = recognise(whole, table)
    slices = re.match(r"(\d+)(?:c\.\d+)?g\.(\d+)gb", share)
    if gpu is None or not slices:
        return None if device.is_instance else gpu
    memory = device.memory_gb or float(slices[2])
    part = min(1.0, int(slices[1]) / _MIG_SLICES)
    return replace(
        gpu,
        name=f"{gpu.name}-{slices[0]}",
        memory_gb=round(memory, 1),
        bf16_tflops=gpu.bf16_tflops * part,
        fp32_tflops=gpu.fp32_tflops * part,
        memory_gbps=gpu.memory_gbps * min(1.0, memory / gpu.memory_gb),
        gpus_per_node=1,
        reserved_gb=min(gpu.reserved_gb, memory / 8),
    )


def recognise(name: str | None, table: dict[str, Gpu]) -> Gpu | None:
    """Recognise `NVIDIA A100-SXM4-80GB` as a100-80gb: the entry that shares most words with the name, the model's
    above all.
    """
    words = set(re.split(r"[^a-z0-9]+", re.sub(r"rtx (?=\d)", "rtx", (name or "").lower())))
    found = [
        (len(words & set(key.split("-"))), -len(key), gpu) for key, gpu in table.items() if key.split("-")[0] in words
    ]
    return max(found, key=lambda entry: entry[:2])[2] if found else None
