"""Finds this machine's GPUs without torch: all of them, and those that CUDA_VISIBLE_DEVICES selects."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from sft.plan.gpus import Device, Gpu, plan_for
from sft.resolve import nvml
from tokenize_data.errors import UserError

_PROC = Path("/proc/driver/nvidia/gpus")
_SIGNS = (
    "/dev/nvidiactl",
    "/dev/nvidia0",
    "/dev/dxg",
)  # names a GPU where neither NVML nor the driver's folder is available
_NONE = ("", "none", "void", "nodevfiles")  # how schedulers and containers hide all GPUs
_ASK_TORCH = (
    "import json, torch; print(json.dumps([torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]))"
)


def visible_gpus() -> int:
    """The number of GPUs that a process on this machine sees."""
    return len(visible())


def visible() -> list[Device]:
    """The GPUs that a process on this machine sees, in CUDA's order."""
    found, is_selected = installed()
    return list(found) if is_selected else selected(found, os.environ.get("CUDA_VISIBLE_DEVICES"))


def local_gpu(table: dict[str, Gpu]) -> Gpu | None:
    """The kind of GPU to plan for: of several kinds, the one with the least memory. None if the table does not have
    it.
    """
    kinds = [plan_for(device, table) for device in visible()]
    known = [kind for kind in kinds if kind is not None]
    return (
        min(known, key=lambda kind: (kind.memory_gb, kind.bf16_tflops), default=None)
        if len(known) == len(kinds)
        else None
    )


@cache
def installed() -> tuple[tuple[Device, ...], bool]:
    """Returns (this machine's GPUs, whether CUDA_VISIBLE_DEVICES has been applied already)."""
    found = nvml.devices()
    if found is None:
        found = _from_driver(_PROC)
    if found or not any(Path(sign).exists() for sign in _SIGNS):
        return tuple(found), False
    return tuple(_from_torch()), True


def selected(devices: Sequence[Device], listed: str | None) -> list[Device]:
    """Select the GPUs that CUDA_VISIBLE_DEVICES names, as CUDA does: numbers, UUIDs or prefixes of them, MIG
    instances; a negative number ends the list.
    """
    gpus = [device for device in devices if not device.is_instance]
    if listed is None:
        whole = [gpu for gpu in gpus if not gpu.is_partitioned]
        return whole or _instances(devices)[:1]
    chosen: list[Device] = []
    for name in (part.strip() for part in listed.split(",")):
        if name.lower() in _NONE or re.fullmatch(r"-\d+", name) or not gpus:
            break
        found = _named(name, devices, gpus, listed)
        if found in chosen:
            raise UserError(
                f"CUDA_VISIBLE_DEVICES={listed} names {name} twice, and CUDA then shows no GPU at all: name each once"
            )
        chosen.append(found)
    return (
        chosen[:1] if any(device.is_instance for device in chosen) else chosen
    )  # CUDA shows only one MIG instance to a process


def check_torch(count: int) -> None:
    """Raise UserError for a CPU-only torch on a machine with GPUs: training would be a hundred times slower."""
    version, cuda = _torch_build()
    if count and version is not None and cuda is None:
        these = "a GPU" if count == 1 else f"{count} GPUs"
        raise UserError(
            f"this machine has {these}, and torch {version} supports CPUs only: install a build for CUDA, with "
            "pip install torch --index-url https://download.pytorch.org/whl/cu128, or hide the GPUs with "
            "CUDA_VISIBLE_DEVICES="
        )


def prepare_gpus() -> None:
    """Prepare a worker before it uses a GPU: nvidia-smi's numbering, expandable segments, and a torch that sees the
    GPU.
    """
    count = visible_gpus()
    if not count:
        return
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    check_torch(count)
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"this machine has {count} GPUs, and torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use "
            "them: update the NVIDIA "
            "driver, install a torch for an older CUDA, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )


def _instances(devices: Sequence[Device]) -> list[Device]:
    return [device for device in devices if device.is_instance]


def _named(name: str, devices: Sequence[Device], gpus: Sequence[Device], listed: str) -> Device:
    where = f"CUDA_VISIBLE_DEVICES={listed}"
    if name.isdecimal():
        if int(name) >= len(gpus):
            there = "one GPU, number 0" if len(gpus) == 1 else f"{len(gpus)} GPUs, numbers 0 to {len(gpus) - 1}"
            raise UserError(f"{where}: there is no GPU {name} here: this machine has {there}")
        gpu = gpus[int(name)]
        inner = [device for device in _instances(devices) if device.index == gpu.index]
        if gpu.is_partitioned and not inner:
            raise UserError(
                f"{where}: GPU {name} is partitioned (MIG) and has no instance: make one with nvidia-smi mig, or "
                "use another GPU"
            )
        return inner[0] if inner else gpu
    if not name.startswith(("GPU-", "MIG-")):
        raise UserError(f"{where}: '{name}' is neither a GPU's number nor a UUID (GPU-..., MIG-...): see nvidia-smi -L")
    pool = _instances(devices) if name.startswith("MIG-") else gpus
    matching = [device for device in pool if device.uuid is not None and device.uuid.startswith(name)]
    if len(matching) == 1:
        return matching[0]
    if not matching and any(device.uuid is None for device in gpus):
        return Device(index=len(gpus), name=gpus[0].name, uuid=name)  # nothing to compare it with
    problem = "matches several" if matching else "is not here"
    raise UserError(
        f"{where}: {name} {problem}: nvidia-smi -L lists {', '.join(device.uuid or '?' for device in pool) or 'none'}"
    )


def _from_driver(folder: Path) -> list[Device]:
    if not folder.is_dir():
        return []
    found = []
    for index, gpu in enumerate(sorted(folder.iterdir())):
        try:
            text = (gpu / "information").read_text()
        except OSError:
            text = ""
        facts = {key: value.strip() for key, value in re.findall(r"^([^:\n]+):[ \t]*(.*)$", text, re.MULTILINE)}
        uuid = facts.get("GPU UUID", "?")
        found.append(Device(index=index, name=facts.get("Model", "GPU"), uuid=None if "?" in uuid else uuid))
    return found


def _from_torch() -> list[Device]:
    """Ask torch in a separate process, so that no CUDA context remains here."""
    try:
        done = subprocess.run([sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=120)
        names = json.loads(done.stdout) if done.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return []
    return [Device(index=index, name=str(name)) for index, name in enumerate(names)]


def _torch_build() -> tuple[str | None, str | None]:
    """Returns (version, CUDA version or None) of the installed torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None, None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return None, None
    values = dict(re.findall(r"^(__version__|cuda|hip)\b[^=\n]*= *(.*)$", text, re.MULTILINE))
    version, cuda, hip = (values.get(name, "None").strip("'\" ") for name in ("__version__", "cuda", "hip"))
    build = next((value for value in (cuda, hip) if value != "None"), None)
    return (None if version == "None" else version), build
