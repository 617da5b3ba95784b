"""Starts a worker: device, threads, process group, and DeepSpeed without its log output."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def prepare_environment() -> None:
    """Set the environment before DeepSpeed is imported: it selects its device and sets up logging on import."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|deepspeed")
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def start_worker(store: Any, timeout_seconds: float = 1800, use_gpu: bool = True) -> torch.device:
    """Join the process group through `store`; RANK and WORLD_SIZE are in the environment. Returns this process's
    device.
    """
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    has_gpu = use_gpu and torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    prepare_environment()
    import deepspeed

    deepspeed_torch: Any = importlib.import_module(
        "deepspeed.comm.torch"
    )  # `from deepspeed.comm import torch` is torch itself

    if not has_gpu:
        # Otherwise it compiles a shared-memory reduction at first use: 20 to 150 seconds, and a compiler is needed
        # (DeepSpeed 0.19).
        deepspeed_torch.build_shm_op = lambda: None
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    backend = "nccl" if has_gpu else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=device if has_gpu else None
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it reports building an extension, which is disabled above
        deepspeed.init_distributed(backend, verbose=False, timeout=timeout)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return device


def stop_worker() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
