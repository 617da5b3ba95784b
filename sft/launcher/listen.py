"""Opens the rendezvous socket on the given address only. No torch here: launchers use it too."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket

_EVERYWHERE = ""


def listen(address: str, port: int, *, is_for_other_hosts: bool, backlog: int = 128) -> socket.socket:
    """Listens on `address` alone, so that nobody on another network of this host can reach it.

    On every interface only where the name leads here by a way that no other host could take: a host's own name is
    127.0.1.1 on many systems.
    """
    place = _resolved(address)
    if is_for_other_hosts and not _is_loopback_typed(address) and ipaddress.ip_address(place).is_loopback:
        place = _EVERYWHERE
    return socket.create_server(
        (place, port), family=socket.AF_INET6 if ":" in place else socket.AF_INET, backlog=backlog
    )


def listen_or_everywhere(address: str, port: int, *, is_for_other_hosts: bool) -> socket.socket:
    """As `listen`, but for an address that is forwarded to this host."""
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
