"""Opens the rendezvous socket on one address only. Without torch, since launchers use it."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket

_EVERYWHERE = ""


def listen(address: str, port: int, *, is_for_other_hosts: bool, backlog: int = 128) -> socket.socket:
    """Listen on `address` only, so that other networks of this host cannot reach it. Listen on every interface only if
    the name resolves to a loopback address: a host's own name is 127.0.1.1 on many systems.
    """
    place = _resolved(address)
    if is_for_other_hosts and not _is_loopback_typed(address) and ipaddress.ip_address(place).is_loopback:
        place = _EVERYWHERE
    return socket.create_server(
        (place, port), family=socket.AF_INET6 if ":" in place else socket.AF_INET, backlog=backlog
    )


def listen_or_everywhere(address: str, port: int, *, is_for_other_hosts: bool) -> socket.socket:
    """As `listen`, also for an address that is forwarded to this host."""
    try:
        return listen(address, port, is_for_other_hosts=is_for_other_hosts)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        return socket.create_server((_EVERYWHERE, port))


def _resolved(address: str) -> str:
    if address == "localhost":
        return "127.0.0.1"
    found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return str(found[0][4][0])


def _is_loopback_typed(address: str) -> bool:
    if address == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return False
