"""Recognises errors that only mean that another process ended, by type and origin, never by text."""

from __future__ import annotations

import sys
import traceback

# Communication backends raise plain RuntimeErrors from C++. The innermost Python frame is then in one of these modules.
_EXCHANGES = ("torch.distributed", "deepspeed.comm", "deepspeed.runtime.pipe.p2p", "sft.optimizer.exchange")


def is_lost_peer(error: BaseException) -> bool:
    """Whether communication with another process failed. The cause is then in that process, not in this one."""
    if isinstance(error, ConnectionError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and isinstance(error, torch.distributed.DistError):
        return True
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(modules) and any(_is_within(modules[-1], name) for name in _EXCHANGES)


def _is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")
