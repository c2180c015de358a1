"""What counts as the address of a service: `host:port`, an IPv6 host in brackets."""

import re
from ipaddress import IPv6Address

_ADDRESS = re.compile(r"(?:\[(?P<ipv6>[^\s\[\]]+)\]|[\w.-]+):(?P<port>[0-9]{1,9})")
LAST_PORT = 65535


def checked_address(given: str) -> str:
    """The address as it is. Raises `ValueError` that quotes it and says what to write instead."""
    scheme, separator, _ = given.partition("://")
    if separator:
        raise ValueError(f"{given!r}: write host:port alone, without {scheme}://")
    found = _ADDRESS.fullmatch(given)
    if found is None or (found["ipv6"] and not _is_ipv6(found["ipv6"])):
        raise ValueError(f"{given!r}: write host:port, or [IPv6]:port")
    if not 1 <= int(found["port"]) <= LAST_PORT:
        raise ValueError(f"{given!r}: write host:port with a port from 1 to {LAST_PORT}")
    return given


def _is_ipv6(host: str) -> bool:
    try:
        IPv6Address(host)
    except ValueError:
        return False
    return True
