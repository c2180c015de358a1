"""The workers as this proxy sees them: who they are, whether they can be reached, their last load.

Written by the membership and the links on the event loop, read by the scheduler.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from omni_proxy.ledger import Ledger
from omni_proxy.ports import DecodePort, PrefillPort
from omni_proxy.replica import Holder, Replica
from omni_proxy.scheduling.forecast import Forecast, LoadCost, Outlook
from omni_proxy.scheduling.policy import Candidate


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class Worker:
    """What a worker is; constant for one epoch."""

    id: str
    address: str
    role: Role
    epoch: int
    model: str
    block_size: int
    max_model_len: int
    max_num_seqs: int = 0
    kv_connector: str = ""
    engine: str = ""


@dataclass(frozen=True, slots=True)
class Load:
    """A worker's own account of its load."""

    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0
    kv_usage: float = 0.0
    leases: int = 0
    step_ms: float = 0.0
    draining: bool = False


@dataclass(slots=True)
class Member:
    """One worker and its state. `is_listed` turns false when the kvstore says that it left."""

    worker: Worker
    prefill: PrefillPort | None
    decode: DecodePort | None
    load: Load = field(default_factory=Load)
    is_reachable: bool = False
    is_listed: bool = True
    is_draining: bool = False

    @property
    def refusal(self) -> str | None:
        """Why the worker takes no work; None if it does."""
        if not self.is_listed:
            return "left"
        if not self.is_reachable:
            return "unreachable"
        if self.is_draining or self.load.draining:
            return "draining"
        if self.decode is not None and not self.decode.ready:
            return "no session"
        return None


class Fleet:
    """Members by worker id, and a signal for those who wait for a change."""

    def __init__(self, model: str, ledger: Ledger, replica: Replica, load_costs: Mapping[str, LoadCost]) -> None:
        """`load_costs`: of a worker's own tiers `host`, `disk` and `remote`."""
        self._model = model
        self._members: dict[str, Member] = {}
        self._changed = asyncio.Event()
        self._load_costs = load_costs
        self.ledger = ledger
        self.replica = replica

    @property
    def members(self) -> Sequence[Member]:
        return tuple(self._members.values())

    def get(self, worker_id: str) -> Member | None:
        return self._members.get(worker_id)

    def put(self, member: Member) -> None:
        """Add a worker or replace its earlier epoch, whose cached blocks are gone."""
        self._members[member.worker.id] = member
        if self._serves(member):
            self.replica.adopt(Holder(member.worker.id, member.worker.epoch))
        self.signal()

    def drop(self, worker_id: str) -> None:
        if self._members.pop(worker_id, None) is not None:
            self.replica.drop(worker_id)
            self.ledger.forget(worker_id)
            self.signal()

    def signal(self) -> None:
        """Wake everyone who waits in `changed`."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        """Until a worker came, went, or changed state; the caller bounds the wait."""
        await self._changed.wait()

    @property
    def max_model_len(self) -> int | None:
        """Tokens that every usable decode worker can hold."""
        lengths = [m.worker.max_model_len for m in self._members.values() if m.decode and m.worker.max_model_len]
        return min(lengths, default=None)

    @property
    def can_decode(self) -> bool:
        return any(m.decode is not None and m.refusal is None and self._serves(m) for m in self._members.values())

    @property
    def block_sizes(self) -> Sequence[int]:
        """Of the model's workers, each once, in order of size."""
        return sorted({m.worker.block_size for m in self._members.values() if self._serves(m)})

    def candidates(self, keys_of: Callable[[int], bytes]) -> list[Candidate]:
        """Workers that take work for the model; `keys_of(block_size)` are the prompt's block keys.

        One lookup per block size answers for all of them.
        """
        usable = [m for m in self._members.values() if m.refusal is None and self._serves(m)]
        outlooks = {size: self._outlook(keys_of(size), size) for size in {m.worker.block_size for m in usable}}
        return [self._candidate(m, outlooks[m.worker.block_size].of(m.worker.id)) for m in usable]

    def _serves(self, member: Member) -> bool:
        return member.worker.model == self._model

    def _outlook(self, keys: bytes, block_size: int) -> Outlook:
        return Outlook(self.replica.lookup(keys, block_size), block_size, self._load_costs, self.replica.pool_costs)

    def _candidate(self, member: Member, forecast: Forecast) -> Candidate:
        worker, load, own = member.worker, member.load, self.ledger.of(member.worker.id)
        return Candidate(
            worker_id=worker.id,
            prefills=worker.role is Role.PREFILL and member.prefill is not None,
            decodes=member.decode is not None,
            kv_connector=worker.kv_connector,
            cached_tokens=forecast.cached_tokens,
            expected_tokens=forecast.expected_tokens,
            loadable_tokens=forecast.loadable_tokens,
            load_ms=forecast.load_ms,
            own_requests=own.requests,
            own_uncached_tokens=own.uncached_tokens,
            dispatched=own.dispatched,
            running=load.running + load.waiting,
            queued_tokens=load.queued_tokens,
            kv_usage=load.kv_usage,
        )
