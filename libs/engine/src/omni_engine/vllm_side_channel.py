"""The port of vLLM's KV side channel, which it binds late in its start."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from omni_common.errors import InvalidRequest
from omni_common.held_port import hold_port
from omni_engine.vllm_settings import VllmSettings

_PORT_VARIABLE = "VLLM_NIXL_SIDE_CHANNEL_PORT"


@contextmanager
def side_channel(settings: VllmSettings) -> Iterator[None]:
    """Keep the port for the engine that is built in the block; nothing where blocks are not transferred.

    Raises:
        InvalidRequest: `kv_host` is not this machine's, or `kv_port` is taken.
    """
    if not settings.kv_connector:
        yield
        return
    host, port = settings.kv_host, settings.kv_port
    try:
        held = hold_port(host, port)
    except OSError as error:
        where, field = (f"{host}:{port}", "vllm.kv_port") if port else (host, "vllm.kv_host")
        why = error.strerror or str(error)
        raise InvalidRequest(f"{field}: the KV side channel cannot listen at {where}: {why}", field=field) from None
    with held:
        os.environ[_PORT_VARIABLE] = str(held.getsockname()[1])
        yield
