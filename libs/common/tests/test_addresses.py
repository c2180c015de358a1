import pytest

from omni_common.addresses import checked_address


@pytest.mark.parametrize(
    "address",
    ["kv:1", "kv-0.kv_store:65535", "10.0.0.2:50061", "bücher.example:80", "[::1]:9001", "[fe80::1%eth0]:9002"],
)
def test_names_ipv4_and_ipv6_in_brackets_are_addresses(address: str) -> None:
    assert checked_address(address) == address


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        pytest.param("", "write host:port, or [IPv6]:port", id="nothing"),
        pytest.param("kv", "write host:port, or [IPv6]:port", id="no port"),
        pytest.param("kv:", "write host:port, or [IPv6]:port", id="empty port"),
        pytest.param(":9001", "write host:port, or [IPv6]:port", id="no host"),
        pytest.param("kv:port", "write host:port, or [IPv6]:port", id="port in words"),
        pytest.param("kv:٣", "write host:port, or [IPv6]:port", id="digits of another script"),
        pytest.param("kv:" + "9" * 5000, "write host:port, or [IPv6]:port", id="endless port"),
        pytest.param("kv:9001/", "write host:port, or [IPv6]:port", id="path"),
        pytest.param("user@kv:9001", "write host:port, or [IPv6]:port", id="user"),
        pytest.param("a:1,b:2", "write host:port, or [IPv6]:port", id="two"),
        pytest.param("a,b:2", "write host:port, or [IPv6]:port", id="two hosts"),
        pytest.param(" kv:9001", "write host:port, or [IPv6]:port", id="blank"),
        pytest.param("kv:9001\n", "write host:port, or [IPv6]:port", id="line break"),
        pytest.param("::1:9001", "write host:port, or [IPv6]:port", id="IPv6 without brackets"),
        pytest.param("[kv]:9001", "write host:port, or [IPv6]:port", id="a name in brackets"),
        pytest.param("[::g]:9001", "write host:port, or [IPv6]:port", id="no IPv6"),
        pytest.param("[]:9001", "write host:port, or [IPv6]:port", id="empty brackets"),
        pytest.param("kv:0", "with a port from 1 to 65535", id="port 0"),
        pytest.param("[::1]:65536", "with a port from 1 to 65535", id="port too high"),
        pytest.param("http://kv:9001", "write host:port alone, without http://", id="http"),
        pytest.param("dns:///kv:9001", "write host:port alone, without dns://", id="dns"),
    ],
)
def test_anything_else_is_quoted_with_what_to_write(given: str, instead: str) -> None:
    with pytest.raises(ValueError) as refused:
        checked_address(given)
    assert str(refused.value).startswith(f"{given!r}: ") and instead in str(refused.value)
