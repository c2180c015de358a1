"""A port that vLLM binds late in its start, kept from everybody else until it has."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from omni_common.errors import InvalidRequest

KV_PORT_VARIABLE = "VLLM_NIXL_SIDE_CHANNEL_PORT"


@contextmanager
def held_port(host: str, port: int) -> Iterator[int]:
    """A port that nobody else gets until the block is left; `port` 0: any.

    It is bound and does not listen. Linux lets a listener that allows the reuse of its address, as ZeroMQ's do, bind
    such a port too, but gives it to nobody who asks for a free one, nor to a connection that goes out.

    Raises:
        InvalidRequest: the address is not this machine's, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        held = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _refusal(host, port, error) from None
    with held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind(address)
        except OSError as error:
            raise _refusal(host, port, error) from None
        yield held.getsockname()[1]


def _refusal(host: str, port: int, error: OSError) -> InvalidRequest:
    where, field = (f"{host}:{port}", "vllm.kv_port") if port else (host, "vllm.kv_host")
    why = error.strerror or str(error)
    return InvalidRequest(f"{field}: the KV side channel cannot listen at {where}: {why}", field=field)
