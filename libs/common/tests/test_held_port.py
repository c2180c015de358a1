"""A port that is held until another process binds it."""

import socket
import struct

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
