"""GPUs are counted and chosen as CUDA does it, from a stub of the driver; and a torch that cannot use them is
refused.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import pytest

from sft.plan.gpus import TABLE, Device, plan_for
from sft.resolve import devices, nvml
from sft.resolve.devices import check_torch, local_gpu, prepare_gpus, selected, visible, visible_gpus
from tokenize_data.errors import UserError

A100, H100, L4 = "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA L4"


class Driver:
    """NVML as ctypes sees it. Each GPU is (name, UUID, [(instance, UUID)] or None)."""

    def __init__(self, gpus: list[tuple[str, str, list[tuple[str, str]] | None]], starts: bool = True) -> None:
        self.gpus, self.starts, self.is_open = gpus, starts, False

    def nvmlInit_v2(self) -> int:  # noqa: N802
        self.is_open = self.starts
        return 0 if self.starts else 9  # NVML_ERROR_DRIVER_NOT_LOADED

    def nvmlShutdown(self) -> int:  # noqa: N802
        self.is_open = False
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        assert self.is_open
        count._obj.value = len(self.gpus)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:  # noqa: N802
        handle._obj.value = 100 * (index + 1)
        return 0

    def nvmlDeviceGetMigMode(self, handle: ctypes.c_void_p, current: Any, pending: Any) -> int:  # noqa: N802
        instances = self._gpu(handle)[2]
        current._obj.value = instances is not None
        return 3 if "L4" in self._gpu(handle)[0] else 0  # NVML_ERROR_NOT_SUPPORTED

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: ctypes.c_void_p, number: int, inner: Any) -> int:  # noqa: N802
        if number >= len(self._gpu(handle)[2] or []):
            return 6  # NVML_ERROR_NOT_FOUND
        inner._obj.value = (handle.value or 0) + number + 1
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, memory: Any) -> int:  # noqa: N802
        memory._obj.total = (39 if (handle.value or 0) % 100 else 79) * 2**30
        return 0

    def nvmlDeviceGetName(self, handle: ctypes.c_void_p, text: Any, length: int) -> int:  # noqa: N802
        text.value = self._facts(handle)[0].encode()
        return 0

    def nvmlDeviceGetUUID(self, handle: ctypes.c_void_p, text: Any, length: int) -> int:  # noqa: N802
        text.value = self._facts(handle)[1].encode()
        return 0

    def _gpu(self, handle: ctypes.c_void_p) -> Any:
        return self.gpus[(handle.value or 0) // 100 - 1]

    def _facts(self, handle: ctypes.c_void_p) -> tuple[str, str]:
        gpu, number = self._gpu(handle), (handle.value or 0) % 100
        if number:
            name, uuid = gpu[2][number - 1]
            return f"{gpu[0]} MIG {name}", uuid
        return gpu[0], gpu[1]


MIXED = Driver(
    [
        (L4, "GPU-11aa", None),
        (A100, "GPU-22bb", None),
        (A100, "GPU-22cc", [("3g.40gb", "MIG-aa1"), ("3g.40gb", "MIG-bb2")]),
        (H100, "GPU-33dd", None),
    ]
)


def found(driver: Driver = MIXED) -> list[Device]:
    answer = nvml.devices(lambda name: driver)
    assert answer is not None
    assert not driver.is_open
    return answer


def test_the_driver_says_what_there_is():
    names = [(device.index, device.name, device.uuid, device.is_partitioned, device.is_instance) for device in found()]
    assert names == [
        (0, L4, "GPU-11aa", False, False),
        (1, A100, "GPU-22bb", False, False),
        (2, A100, "GPU-22cc", True, False),
        (2, f"{A100} MIG 3g.40gb", "MIG-aa1", False, True),
        (2, f"{A100} MIG 3g.40gb", "MIG-bb2", False, True),
        (3, H100, "GPU-33dd", False, False),
    ]
    assert nvml.devices(lambda name: Driver([], starts=False)) is None

    def missing(name: str) -> Any:
        raise OSError(name)

    assert nvml.devices(missing) is None


@pytest.mark.parametrize(
    ("listed", "uuids"),
    [
        (None, ["GPU-11aa", "GPU-22bb", "GPU-33dd"]),
        ("", []),
        ("-1", []),
        ("none", []),
        ("NoDevFiles", []),
        ("3,1", ["GPU-33dd", "GPU-22bb"]),
        ("0, 1", ["GPU-11aa", "GPU-22bb"]),
        ("1,-1,0", ["GPU-22bb"]),
        ("GPU-33", ["GPU-33dd"]),
        ("GPU-22bb,0", ["GPU-22bb", "GPU-11aa"]),
        ("MIG-bb2", ["MIG-bb2"]),
        ("2", ["MIG-aa1"]),
        ("MIG-bb2,MIG-aa1", ["MIG-bb2"]),
    ],
)
def test_what_is_selected_is_what_cuda_shows(listed, uuids):
    assert [device.uuid for device in selected(found(), listed)] == uuids


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("0,4", "CUDA_VISIBLE_DEVICES=0,4: there is no GPU 4 here: this machine has 4 GPUs, numbers 0 to 3"),
        ("1,1", "names 1 twice, and CUDA then shows no GPU at all"),
        ("GPU-44", "GPU-44 is not here: nvidia-smi -L lists GPU-11aa, GPU-22bb, GPU-22cc, GPU-33dd"),
        ("GPU-22", "GPU-22 matches several"),
        ("MIG-zz", "MIG-zz is not here: nvidia-smi -L lists MIG-aa1, MIG-bb2"),
        ("all", "'all' is neither a GPU's number nor a UUID"),
    ],
)
def test_what_is_not_there_is_refused(listed, message):
    with pytest.raises(UserError) as refused:
        selected(found(), listed)
    assert message in str(refused.value)


def test_a_partitioned_gpu_without_instances_is_refused():
    empty = found(Driver([(A100, "GPU-1", [])]))
    with pytest.raises(UserError, match=r"GPU 0 is partitioned \(MIG\) and has no instance"):
        selected(empty, "0")
    assert selected(empty, None) == []


def test_without_a_driver_nothing_is_selected():
    assert selected([], "0,1") == []
    assert selected([], None) == []


def here(monkeypatch: pytest.MonkeyPatch, gpus: list[Device], listed: str | None, is_selected: bool = False) -> None:
    monkeypatch.setattr(devices, "installed", lambda: (tuple(gpus), is_selected))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)


@pytest.mark.parametrize(
    ("listed", "kind"),
    [("1", "a100-80gb"), ("3", "h100-80gb"), ("3,0", "l4-24gb"), ("GPU-33dd", "h100-80gb"), ("", None)],
)
def test_plans_are_for_the_gpu_that_is_selected(monkeypatch, listed, kind):
    here(monkeypatch, found(), listed)
    gpu = local_gpu(TABLE)
    assert (gpu and gpu.name) == kind


def test_an_instance_has_its_share(monkeypatch):
    here(monkeypatch, found(), "MIG-aa1")
    gpu, whole = local_gpu(TABLE), TABLE["a100-80gb"]
    assert gpu is not None
    assert (gpu.name, gpu.memory_gb, gpu.gpus_per_node) == ("a100-80gb-3g.40gb", 39.0, 1)
    assert gpu.bf16_tflops == pytest.approx(whole.bf16_tflops * 3 / 7)
    assert plan_for(Device(index=0, name="NVIDIA Wonder 9000"), TABLE) is None


def test_where_the_driver_s_folder_is_all_there_is(monkeypatch, tmp_path):
    for number, (name, uuid) in enumerate([(A100, "GPU-a1"), (H100, "GPU-?????")]):
        (tmp_path / f"0000:0{number}:00.0").mkdir()
        (tmp_path / f"0000:0{number}:00.0" / "information").write_text(
            f"Model: \t\t {name}\nIRQ:   \t\t 24\nGPU UUID: \t {uuid}\n"
        )
    seen = devices._from_driver(tmp_path)
    assert [(device.name, device.uuid) for device in seen] == [(A100, "GPU-a1"), (H100, None)]
    assert devices._from_driver(tmp_path / "none") == []
    assert [device.uuid for device in selected(seen, "GPU-zz")] == ["GPU-zz"]  # nothing to compare it with


@pytest.fixture
def fresh():
    devices.installed.cache_clear()
    yield
    devices.installed.cache_clear()


def test_torch_is_asked_where_only_it_can_tell(monkeypatch, tmp_path, fresh):
    """As on WSL or gVisor: no folder of the driver, no NVML, but a device file."""
    monkeypatch.setattr(nvml, "devices", lambda: None)
    monkeypatch.setattr(devices, "_PROC", tmp_path / "none")
    monkeypatch.setattr(devices, "_from_torch", lambda: [Device(index=0, name=H100)])
    monkeypatch.setattr(devices, "_SIGNS", (str(tmp_path / "dxg"),))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert visible_gpus() == 0
    devices.installed.cache_clear()
    (tmp_path / "dxg").touch()
    assert [device.name for device in visible()] == [H100]  # torch has applied CUDA_VISIBLE_DEVICES already


def test_nvml_is_asked_where_the_driver_has_no_folder(monkeypatch, tmp_path, fresh):
    answer = found()
    monkeypatch.setattr(nvml, "devices", lambda: answer)
    monkeypatch.setattr(devices, "_PROC", tmp_path / "none")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    assert visible_gpus() == 2


def test_a_torch_for_cpus_is_refused_on_a_machine_with_gpus(monkeypatch):
    check_torch(0)
    with pytest.raises(UserError) as refused:
        check_torch(2)  # these tests run with such a torch
    assert "this machine has 2 GPUs, and torch 2." in str(refused.value)
    assert "supports CPUs only: install a build for CUDA, with pip install torch --index-url" in str(refused.value)
    monkeypatch.setattr(devices, "_torch_build", lambda: ("2.13.0", "13.0"))
    check_torch(2)
    here(monkeypatch, found(), "3")
    with pytest.raises(
        UserError, match=r"this machine has 1 GPUs?, and torch .* cannot use them: update the NVIDIA driver"
    ):
        prepare_gpus()


@pytest.mark.parametrize("own", [None, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_workers_on_gpus_use_segments_that_grow(monkeypatch, own):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what is set ends with the test
    if own:
        os.environ[own] = "max_split_size_mb:512"
    here(monkeypatch, [], None)
    prepare_gpus()
    assert own or "PYTORCH_ALLOC_CONF" not in os.environ  # a CPU has no such thing
    here(monkeypatch, found(), None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(devices, "check_torch", lambda count: None)
    prepare_gpus()
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert os.environ.get("PYTORCH_ALLOC_CONF") == {
        None: "expandable_segments:True",
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:512",
    }.get(own)


def test_training_refuses_it_before_anything_is_tokenised(monkeypatch, tmp_path):
    from sft.config.settings import Settings
    from sft.resolve import data_stage

    monkeypatch.setattr(data_stage, "visible_gpus", lambda: 1)
    base: Any = type("Base", (), {"config": {"model_type": "llama"}})()
    with pytest.raises(UserError, match="this machine has a GPU, and torch"):
        data_stage.tokenise(Settings.of(run_name="r", data=(str(tmp_path / "none.jsonl"),)), base)
    assert not Path("tokenized").exists()
