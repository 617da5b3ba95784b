"""Who can reach the place where processes meet."""

from __future__ import annotations

import socket

import pytest

from sft.launcher import listen as module
from sft.launcher.listen import listen, listen_or_everywhere


def test_it_listens_on_the_named_address_alone():
    with listen("127.0.0.2", 0, is_for_other_hosts=True) as server:
        port = server.getsockname()[1]
        assert server.getsockname()[0] == "127.0.0.2"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        socket.create_connection(("127.0.0.2", port), timeout=5).close()


@pytest.mark.parametrize(("several", "place"), [(False, "127.0.1.1"), (True, "0.0.0.0")])
def test_a_host_whose_own_name_is_a_loopback_address(monkeypatch: pytest.MonkeyPatch, several: bool, place: str):
    """Debian's /etc/hosts: no other host could come to 127.0.1.1."""
    monkeypatch.setattr(module, "_resolved", lambda address: "127.0.1.1")
    with listen("node0", 0, is_for_other_hosts=several) as server:
        assert server.getsockname()[0] == place


def test_an_address_that_is_forwarded_to_this_host():
    with pytest.raises(OSError, match="assign requested address"):
        listen("192.0.2.1", 0, is_for_other_hosts=True)
    with listen_or_everywhere("192.0.2.1", 0, is_for_other_hosts=True) as server:
        assert server.getsockname()[0] == "0.0.0.0"


def test_a_port_in_use_is_an_error():
    with listen("localhost", 0, is_for_other_hosts=False) as server, pytest.raises(OSError, match="in use"):
        listen_or_everywhere("localhost", server.getsockname()[1], is_for_other_hosts=False)
