"""A port that is held until vLLM binds it."""

import socket
import struct

import pytest
import zmq

from omni_common.errors import InvalidRequest
from omni_engine.vllm_ports import held_port

IP_LOCAL_PORT_RANGE = 51


def test_a_held_port_is_zeromqs_and_nobody_elses() -> None:
    with held_port("127.0.0.1", 0) as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
            router.bind(f"tcp://127.0.0.1:{port}")
            with pytest.raises(InvalidRequest, match=f"cannot listen at 127.0.0.1:{port}: Address already in use"):
                held_port("127.0.0.1", port).__enter__()
    with held_port("127.0.0.1", port) as again:
        assert again == port


def test_a_held_port_is_given_to_nobody_who_asks_for_any() -> None:
    """Neither to a listener nor to a connection that goes out, though it is the only one they may have."""
    with socket.create_server(("127.0.0.1", 0)) as server, held_port("127.0.0.1", 0) as port:
        for goes_out in (False, True):
            with socket.socket() as asks:
                asks.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    asks.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("I", port << 16 | port))
                except OSError:
                    pytest.skip("this kernel cannot bound the ports of one socket (Linux 6.3 can)")
                with pytest.raises(OSError, match=r"in use|assign"):
                    asks.connect(server.getsockname()) if goes_out else asks.bind(("127.0.0.1", 0))


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 0), ("no-such-host.invalid", 0), ("192.0.2.1", 5)])
def test_an_address_of_another_machine_names_the_setting(host: str, port: int) -> None:
    with pytest.raises(InvalidRequest, match=f"cannot listen at {host}") as refused, held_port(host, port):
        pass
    assert refused.value.field == ("vllm.kv_port" if port else "vllm.kv_host")
