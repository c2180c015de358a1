"""The port of vLLM's KV side channel: held until vLLM listens there, or refused by the setting's name."""

import os
import socket

import pytest
import zmq

from omni_common.errors import InvalidRequest
from omni_engine.vllm_settings import VllmSettings
from omni_engine.vllm_side_channel import side_channel

VARIABLE = "VLLM_NIXL_SIDE_CHANNEL_PORT"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")


def test_the_port_is_kept_for_vllms_listener() -> None:
    with side_channel(VllmSettings(kv_host="127.0.0.1")):
        port = int(os.environ[VARIABLE])
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
            router.bind(f"tcp://127.0.0.1:{port}")


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 0), ("no-such-host.invalid", 0), ("192.0.2.1", 5)])
def test_an_address_of_another_machine_names_the_setting(host: str, port: int) -> None:
    settings = VllmSettings(kv_host=host, kv_port=port)
    with pytest.raises(InvalidRequest, match=f"cannot listen at {host}") as refused, side_channel(settings):
        pass
    assert refused.value.field == ("vllm.kv_port" if port else "vllm.kv_host")


def test_a_taken_port_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = VllmSettings(kv_host="127.0.0.1", kv_port=port)
        refusal = f"kv_port: .* at 127.0.0.1:{port}: Address already in use"
        with pytest.raises(InvalidRequest, match=refusal), side_channel(settings):
            pass


def test_an_engine_that_transfers_no_blocks_needs_no_port() -> None:
    with side_channel(VllmSettings(kv_connector="", kv_host="192.0.2.1")):
        assert not os.environ[VARIABLE]
