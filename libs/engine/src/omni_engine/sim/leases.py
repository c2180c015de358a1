"""Blocks of finished prefills, kept until pulled, released or expired."""

import asyncio
from dataclasses import dataclass

from omni_engine.sim.blocks import BlockPool
from omni_engine.sim.clock import Clock


@dataclass(slots=True)
class _Lease:
    blocks: list[int]
    num_tokens: int
    expires_s: float
    is_pinned: bool = False


class LeaseTable:
    """Owner of leased blocks; `run` ends those whose time is up."""

    def __init__(self, pool: BlockPool, clock: Clock, lease_s: float, on_freed: asyncio.Event) -> None:
        self._pool = pool
        self._clock = clock
        self._lease_s = lease_s
        self._on_freed = on_freed
        self._leases: dict[str, _Lease] = {}
        self._granted = asyncio.Event()

    def __len__(self) -> int:
        return len(self._leases)

    def grant(self, lease_id: str, blocks: list[int], num_tokens: int) -> None:
        self.free(lease_id)
        self._leases[lease_id] = _Lease(blocks, num_tokens, self._clock.now_s() + self._lease_s)
        self._granted.set()

    def pin(self, lease_id: str) -> int | None:
        """A pull begins: the lease does not expire meanwhile. Tokens held, or None if there is no such lease."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.is_pinned:
            return None
        lease.is_pinned = True
        return lease.num_tokens

    def free(self, lease_id: str) -> bool:
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return False
        self._pool.release(lease.blocks)
        self._on_freed.set()
        return True

    async def run(self) -> None:
        """Expire leases, in the order they were granted."""
        while True:
            waiting = [(lease.expires_s, name) for name, lease in self._leases.items() if not lease.is_pinned]
            if not waiting:
                self._granted.clear()
                await self._granted.wait()
                continue
            expires_s, name = min(waiting)
            await self._clock.sleep(expires_s - self._clock.now_s())
            lease = self._leases.get(name)
            if lease is not None and not lease.is_pinned and lease.expires_s <= self._clock.now_s():
                self.free(name)
