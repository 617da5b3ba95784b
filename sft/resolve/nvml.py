"""Lists GPUs and MIG instances through NVML, the management library that comes with the driver, by ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sft.plan.gpus import GB, Device

_NAMES = ("libnvidia-ml.so.1", "/usr/lib/wsl/lib/libnvidia-ml.so.1", "nvml.dll")
_TEXT = 96  # NVML's own limit of a name or UUID
_MOST_MIG = 8


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def devices(load: Callable[[str], Any] = ctypes.CDLL) -> list[Device] | None:
    """GPUs in nvidia-smi's order, each followed by its MIG instances. None without the library or the driver."""
    library = _loaded(load)
    if library is None:
        return None
    with _started(library) as is_started:
        if not is_started:
            return None
        count = ctypes.c_uint(0)
        if library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return None
        found: list[Device] = []
        for index in range(count.value):
            handle = ctypes.c_void_p()
            if not library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
                found += _with_instances(library, handle, index)
        return found


def _loaded(load: Callable[[str], Any]) -> Any:
    for name in _NAMES:
        try:
            return load(name)
        except OSError:
            continue
    return None


@contextmanager
def _started(library: Any) -> Iterator[bool]:
    is_started = library.nvmlInit_v2() == 0
    try:
        yield is_started
    finally:
        if is_started:
            library.nvmlShutdown()


def _with_instances(library: Any, handle: ctypes.c_void_p, index: int) -> list[Device]:
    current, pending = ctypes.c_uint(0), ctypes.c_uint(0)
    has_mode = (
        library.nvmlDeviceGetMigMode(handle, ctypes.byref(current), ctypes.byref(pending)) == 0
    )  # older GPUs have no MIG
    is_partitioned = has_mode and current.value == 1
    gpu = _device(library, handle, index, is_partitioned=is_partitioned)
    if not is_partitioned:
        return [gpu]
    instances = []
    for number in range(_MOST_MIG):
        inner = ctypes.c_void_p()
        if not library.nvmlDeviceGetMigDeviceHandleByIndex(handle, number, ctypes.byref(inner)):
            instances.append(_device(library, inner, index, is_instance=True))
    return [gpu, *instances]


def _device(
    library: Any, handle: ctypes.c_void_p, index: int, *, is_partitioned: bool = False, is_instance: bool = False
) -> Device:
    memory = _Memory()
    has_memory = library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0
    return Device(
        index=index,
        name=_text(library.nvmlDeviceGetName, handle) or "GPU",
        uuid=_text(library.nvmlDeviceGetUUID, handle),
        memory_gb=memory.total / GB if has_memory else None,
        is_partitioned=is_partitioned,
        is_instance=is_instance,
    )


def _text(function: Any, handle: ctypes.c_void_p) -> str | None:
    text = ctypes.create_string_buffer(_TEXT)
    return text.value.decode("utf-8", "replace") if function(handle, text, _TEXT) == 0 else None
