"""Finds the network interface that reaches the first node. By default, gloo and NCCL use the host's name or the first
interface.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct

_GET_ADDRESS = 0x8915  # SIOCGIFADDR


def interface_towards(address: str) -> str | None:
    """The interface's name, such as eth0; None if unknown."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # does not send anything
            own = probe.getsockname()[0]
    except OSError:
        return None
    for _, name in socket.if_nameindex():
        with contextlib.suppress(OSError):
            if _address_of(name) == own:
                return name
    return None


def _address_of(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, struct.pack("256s", interface.encode()[:15]))
    return socket.inet_ntoa(answer[20:24])
