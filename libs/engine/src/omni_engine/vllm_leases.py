"""Leases on the blocks of finished prefills, as the frontend sees them.

The connector's worker holds the truth and does not report a pull to the frontend, so while leases are out
their state is asked for a few times a second.
"""

import asyncio
import contextlib
import logging
import time
from typing import Any

log = logging.getLogger(__name__)

LEASE_ENDS = "omni_lease_ends_unix_s"
"""When, in the `kv_transfer_params` of a request that pulls."""
LEASE_BEGAN = "omni_lease_began_unix_s"
"""No later than when it did, in those that a finished prefill hands over."""
CLOCKS_DIFFER_S = 1.0
"""At most, between the machines of two engines."""

_POLL_S = 0.25
_RPC_TIMEOUT_S = 10.0
# The worker learns of a lease one engine step after the frontend; an idle engine steps every millisecond or so.
_RELEASE_ATTEMPTS = 20
_RELEASE_PAUSE_S = 0.02


def numbered(request_id: str, number: int) -> str:
    """The engine core's name of a request, and of its lease."""
    return f"{request_id}#{number}"


def _request_of(lease_id: str) -> str:
    return lease_id.rpartition("#")[0]


class Leases:
    """Which leases are out. `held` counts granted ones that were neither pulled, released nor expired."""

    def __init__(self, engine_core: Any, *, enabled: bool) -> None:
        self._core = engine_core
        self._expiry_s: dict[str, float] = {}
        self._granted = asyncio.Event()
        self._releasing: set[asyncio.Task[bool]] = set()
        self.task = asyncio.create_task(self._watch(), name="vllm-leases") if enabled else None

    @property
    def held(self) -> int:
        return len(self._expiry_s)

    def grant(self, lease_id: str, lease_s: float) -> None:
        self._expiry_s[lease_id] = time.monotonic() + lease_s
        self._granted.set()

    async def release(self, name: str) -> bool:
        """End one lease, named by itself or by its request; False if the engine holds none of that name."""
        lease_id = name
        if name not in self._expiry_s:
            lease_id = next((held for held in self._expiry_s if _request_of(held) == name), name)
        for _ in range(_RELEASE_ATTEMPTS):
            if any(lease_id in held for held in await self._call("omni_release_leases", [lease_id])):
                self._expiry_s.pop(lease_id, None)
                return True
            if lease_id not in self._expiry_s:
                return False
            await asyncio.sleep(_RELEASE_PAUSE_S)
        self._expiry_s.pop(lease_id, None)
        return False

    def release_later(self, lease_id: str) -> None:
        """End a lease nobody was told of."""
        self.grant(lease_id, _RPC_TIMEOUT_S)
        task = asyncio.create_task(self.release(lease_id), name="vllm-release")
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)

    async def _watch(self) -> None:
        while True:
            await self._granted.wait()
            await asyncio.sleep(_POLL_S)
            asked = frozenset(self._expiry_s)
            with contextlib.suppress(TimeoutError):
                held = {lease_id for ids in await self._call("omni_held_leases") for lease_id in ids}
                for lease_id in asked - held:
                    self._expiry_s.pop(lease_id, None)
            if not self._expiry_s:
                self._granted.clear()

    async def _call(self, method: str, *args: Any) -> list[list[str]]:
        async with asyncio.timeout(_RPC_TIMEOUT_S):
            answers: list[list[str]] = await self._core.collective_rpc_async(method, _RPC_TIMEOUT_S, args)
        return answers
