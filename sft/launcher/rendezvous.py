"""The rendezvous of a run's processes: a store at MASTER_ADDR."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sft.launcher.listen import listen_or_everywhere
from sft.spec.workers import ATTEMPT


def connect(timeout_seconds: float) -> Any:
    """Connect to the store, which rank 0 or torchrun's agent hosts. Torch's own would listen on every interface. Keys
    start with the attempt's name, so that workers of another run with the wrong port cannot join.
    """
    return dist.PrefixStore(os.environ.get(ATTEMPT, "sft"), _connected(timeout_seconds))  # type: ignore[attr-defined]


def _connected(timeout_seconds: float) -> Any:
    c10d: Any = dist
    address, port, timeout = (
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        timedelta(seconds=timeout_seconds),
    )
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = c10d.TCPStore(address, port, world, False, timeout)
        return c10d.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    if rank > 0:
        return c10d.TCPStore(address, port, world, False, timeout)
    has_other_hosts = world > int(os.environ.get("LOCAL_WORLD_SIZE", world))
    listening = listen_or_everywhere(address, port, is_for_other_hosts=has_other_hosts).detach()
    return c10d.TCPStore(address, port, world, True, timeout, wait_for_workers=False, master_listen_fd=listening)
