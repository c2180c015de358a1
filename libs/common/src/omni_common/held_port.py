"""A port that another process is to bind, kept from everybody else until it has."""

import socket


def hold_port(host: str, port: int = 0) -> socket.socket:
    """A socket bound to a port that nobody else gets until it is closed; `port` 0: any. A name is held on IPv4.

    It does not listen. Linux lets a listener that allows the reuse of its address, as Redis's and ZeroMQ's do, bind
    such a port too, but gives it to nobody who asks for a free one, nor to a connection that goes out.

    Raises:
        OSError: the address is not this machine's, or the port is taken.
    """
    wished = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, wished, socket.SOCK_STREAM)[0]
    except UnicodeError as error:
        raise OSError(f"no host name: {error}") from None
    held = socket.socket(family, kind, protocol)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(address)
    except OSError:
        held.close()
        raise
    return held
