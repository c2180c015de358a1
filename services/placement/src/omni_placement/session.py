"""One watch of the worker that holds a group's ranks, and the order it was sent."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from omni_common.errors import FailedPrecondition, InvalidRequest
from omni_placement.book import Outcome, Published
from omni_placement.layout import Layout
from omni_placement.load.book import GroupName
from omni_placement.migration import Round, apply_rounds


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is asked to do: `rounds`, which end at the layout of `published`. `failed_ranks` take no part."""

    migration_id: str
    published: Published
    rounds: tuple[Round, ...]
    failed_ranks: frozenset[int]


@dataclass(frozen=True, slots=True)
class Ack:
    """A worker's word on an order."""

    name: GroupName
    worker_id: str
    layout_version: int
    migration_id: str
    rounds_done: int
    outcome: Outcome
    failed_ranks: frozenset[int] = frozenset()
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """A layout that did not get into the engine. `held` is what the worker holds, as far as is known; `is_first` says
    that its engine has applied nothing since it started."""

    name: GroupName
    version: int
    held: Layout
    failed_ranks: frozenset[int]
    detail: str
    is_first: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """What an ack added: rounds of its order that are done, and the failure that ended it."""

    order: Order
    rounds: tuple[Round, ...]
    failure: Failure | None = None

    @property
    def moved_bytes(self) -> int:
        """Sent between ranks; 0 where nobody has said how large an expert is."""
        sent = sum(m.source_rank != m.target_rank for step in self.rounds for m in step.moves)
        return sent * self.order.published.layout.topology.expert_bytes


class Session:
    """One watch of the worker that holds a group's ranks. At most one order is under way."""

    def __init__(self, name: GroupName, worker_id: str, held: Layout, is_fresh: bool) -> None:
        self.name, self.worker_id, self._is_fresh = name, worker_id, is_fresh
        self._start = held
        self.order: Order | None = None
        self.applied_version = 0
        self.rounds_done = 0
        self.deadline_s = 0.0
        self._closed = ("", Outcome.NONE)  # the order whose last word was taken, and that word
        # One order and the end, at most.
        self._outbox: asyncio.Queue[Order | None] = asyncio.Queue(maxsize=2)

    @property
    def held(self) -> Layout:
        """What the worker holds after the rounds it said it applied."""
        return apply_rounds(self._start, self.order.rounds[: self.rounds_done]) if self.order else self._start

    def send(self, order: Order, start: Layout, deadline_s: float) -> None:
        """Pass on an order whose rounds begin at `start`, what the worker holds."""
        self.order, self._start, self.rounds_done, self.deadline_s = order, start, 0, deadline_s
        self._outbox.put_nowait(order)

    def end(self) -> None:
        """The stream ends once it has sent what it has."""
        self._start, self.order = self.held, None
        if not self._outbox.full():
            self._outbox.put_nowait(None)

    async def orders(self) -> AsyncIterator[Order]:
        """Orders to pass on, until the session ends."""
        while (order := await self._outbox.get()) is not None:
            yield order

    def advance(self, ack: Ack) -> Progress | None:
        """Take what an ack says was done; None for a repeated last word.

        Raises:
            FailedPrecondition: another order is under way, or none.
            InvalidRequest: a count of rounds that cannot be.
        """
        if self._closed == (ack.migration_id, ack.outcome):
            return None
        order = self.order
        if order is None or order.migration_id != ack.migration_id:
            message = f"migration {ack.migration_id!r} is not under way"
            raise FailedPrecondition(message, field="migration_id", reason="unknown_migration")
        if ack.layout_version != order.published.version:
            message = f"migration {order.migration_id} is one to version {order.published.version}"
            raise InvalidRequest(message, field="layout_version")
        least = len(order.rounds) if ack.outcome is Outcome.APPLIED else self.rounds_done
        if not least <= ack.rounds_done <= len(order.rounds):
            message = f"rounds_done must lie between {least} and {len(order.rounds)}"
            raise InvalidRequest(message, field="rounds_done")
        done, self.rounds_done = order.rounds[self.rounds_done : ack.rounds_done], ack.rounds_done
        if ack.outcome is Outcome.FAILED:
            self._closed = ack.migration_id, ack.outcome
            is_first = self._is_fresh and not self.applied_version and not ack.rounds_done
            failure = Failure(self.name, order.published.version, self.held, ack.failed_ranks, ack.detail, is_first)
            return Progress(order, done, failure)
        if ack.outcome is Outcome.APPLIED:
            self._start, self.order = order.published.layout, None
            self._closed, self.applied_version = (ack.migration_id, ack.outcome), ack.layout_version
        return Progress(order, done)
