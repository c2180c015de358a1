"""A port that is held until another process binds it."""

import socket
import struct
from typing import Any

import pytest

from omni_common.held_port import hold_port

IP_LOCAL_PORT_RANGE = 51


def test_a_held_port_is_that_of_a_listener_and_nobody_elses() -> None:
    with hold_port("127.0.0.1") as held:
        port = held.getsockname()[1]
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        for _ in range(2):
            with socket.create_server(("127.0.0.1", port)):  # which allows the reuse of its address
                with socket.create_connection(("127.0.0.1", port), timeout=5):
                    pass
                with pytest.raises(OSError, match="in use"):
                    hold_port("127.0.0.1", port)
    with hold_port("127.0.0.1", port) as again:
        assert again.getsockname()[1] == port


def test_a_name_is_held_where_those_who_are_told_it_bind(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeroMQ binds names on IPv4, also where the machine prefers IPv6 for them."""
    resolve = socket.getaddrinfo

    def prefers_ipv6(host: str, port: int, family: int = 0, *more: int, **named: int) -> list[Any]:
        given = {socket.AF_INET: ["127.0.0.1"], socket.AF_INET6: ["::1"]}.get(family, ["::1", "127.0.0.1"])
        return [
            found for one in given for found in resolve(one if host == "localhost" else host, port, 0, *more, **named)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", prefers_ipv6)
    with hold_port("localhost") as held:
        assert held.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize("host", ["a..b", "x" * 64])
def test_what_is_no_name_is_an_error_of_the_system(host: str) -> None:
    with pytest.raises(OSError, match="no host name"):
        hold_port(host)


def test_a_held_port_is_given_to_nobody_who_asks_for_any() -> None:
    """Neither to a listener nor to a connection that goes out, though it is the only one they may have."""
    with socket.create_server(("127.0.0.1", 0)) as server, hold_port("127.0.0.1") as held:
        port = held.getsockname()[1]
        for goes_out in (False, True):
            with socket.socket() as asks:
                asks.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    asks.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("I", port << 16 | port))
                except OSError:
                    pytest.skip("this kernel cannot bound the ports of one socket (Linux 6.3 can)")
                with pytest.raises(OSError, match=r"in use|assign"):
                    asks.connect(server.getsockname()) if goes_out else asks.bind(("127.0.0.1", 0))
