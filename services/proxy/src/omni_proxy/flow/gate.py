"""Lets waiting requests go one by one, as workers come to have room.

The choice of workers is made after the release, with what is known then. So that the next one is judged with this one
on its worker's account, one request is released per pass of the event loop; its task must dispatch, or charge the
ledger, before it awaits anything.

    turn() -> room and nobody waits: at once
           -> else queue -> head: room, or its predicted boundary (timer), or something changed (poke) -> released

A head without room holds up who is behind it, but for one thing: where it waits for those that serve its LoRA adapter
while others have room, all who wait for the same workers are passed over. Each of them keeps its place.
"""

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from omni_common.errors import DeadlineExceeded, Internal, OmniError, ResourceExhausted, Unavailable
from omni_proxy.flow.metrics import FlowMetrics, Release
from omni_proxy.flow.pace import Pace
from omni_proxy.flow.queue import FlowQueue
from omni_proxy.flow.settings import FlowSettings
from omni_proxy.flow.ticket import OUTPUT_WEIGHT, Ticket

log = logging.getLogger(__name__)

_RECHECK_S = 0.05
"""Longest time a prediction is believed: what is stale or wrong corrects itself so soon."""
_NO_WAIT_MS = 0.05
"""So short a wait is none: a timer is not that exact."""
_SLO_MARGIN_S = 0.005
"""So long before its latest start a head is released anyway."""
_NO_WORKER_RETRY_S = 1.0
_MOST_BUSY = 16
"""Sets of workers without room that one look passes over: each costs a question to the predictors."""
_MOST_UNSERVED = 1024
"""Adapters without workers that are remembered while nobody waits for them."""


class Room(Protocol):
    """What the predictors say of the fleet."""

    def room_in_ms(self, ticket: Ticket) -> float:
        """Until a worker would begin within the look-ahead; 0: now, inf: no worker takes work, nan: not predicted."""

    def drain_ms(self, adapter: str = "") -> float:
        """Until the least loaded worker has computed what is in flight; inf: no worker takes work."""

    def takers(self, adapter: str) -> Hashable:
        """Equal for adapters that the same workers serve, and unlike any other's where nobody does."""


class Timers(Protocol):
    """The part of an event loop the gate needs."""

    def time(self) -> float: ...

    def call_at(self, when: float, callback: Callable[[], object]) -> asyncio.TimerHandle: ...

    def call_soon(self, callback: Callable[[], object]) -> asyncio.Handle: ...


@dataclass(slots=True)
class Turn:
    """A request's leave to go to the workers."""

    waited_ms: float
    has_waited: bool
    """Others ran meanwhile, even if it took no time."""
    reason: Release
    ticket: Ticket
    _ended: Callable[[int], None]

    def ended(self, tokens: int) -> None:
        """Settle its tenant's service with the tokens generated; again is nothing."""
        ended, self._ended = self._ended, _nothing
        ended(tokens)


@dataclass(slots=True)
class _Passed:
    """Adapters that are passed over, by the workers that serve them; the model itself never is."""

    takers_of: Callable[[str], Hashable]
    takers: set[Hashable] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.takers)

    def __contains__(self, adapter: object) -> bool:
        return isinstance(adapter, str) and adapter != "" and self.takers_of(adapter) in self.takers


class FlowGate:
    """The only owner of the queue. `timers` is the running event loop unless a test passes another clock."""

    def __init__(self, queue: FlowQueue, room: Room, metrics: FlowMetrics, timers: Timers | None = None) -> None:
        self._queue = queue
        self._room = room
        self._metrics = metrics
        self._timers: Timers = asyncio.get_running_loop() if timers is None else timers
        self._waiting: dict[Ticket, asyncio.Future[Release]] = {}
        self._pace = Pace()
        self._soon: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._boundary_s = math.inf
        self._progress_s = self._timers.time()
        """When something was released last, or the queue was empty."""
        self._no_worker_s: dict[str, float] = {}
        """Since when no worker takes work for an adapter, or at all."""
        self._held_s: dict[Hashable, float] = {}
        """Since when somebody waits for these workers, and nobody who did has gone."""
        self._adapters: Counter[str] = Counter()
        """Of those who wait."""
        self._have_workers_changed = False
        self._judged: Ticket | None = None
        self._is_ahead = False
        """A request was released for its service level alone; the next one waits for room."""
        self._watch()

    async def turn(self, ticket: Ticket) -> Turn:
        """Wait until the request may go to the workers. Cancelling gives its place up.

        Raises:
            ResourceExhausted: a bound is reached, the wait would be too long, or it was.
            Unavailable: no worker takes work.
            DeadlineExceeded: the request's own time is over.
        """
        now = self._timers.time()
        if not self._queue and self._soon is None and (reason := self._reason_at_once(ticket, now)) is not None:
            self._queue.pass_by(ticket, now)
            return self._turn(ticket, now, reason, has_waited=False)
        self._enqueue(ticket, now)
        waiting: asyncio.Future[Release] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = waiting
        self._adapters[ticket.adapter] += 1
        self.poke()
        try:
            reason = await waiting
        except asyncio.CancelledError:
            if self._queue.remove(ticket) or waiting.cancelled():
                self._metrics.dropped.labels("cancelled").inc()
            elif waiting.exception() is None:
                self._queue.settle(ticket, -ticket.service, self._timers.time())
            self.poke()
            raise
        finally:
            self._waiting.pop(ticket, None)
            self._waits_no_more(ticket.adapter)
        return self._turn(ticket, now, reason, has_waited=True)

    def refused(self, turn: Turn, error: OmniError) -> None:
        """Count a request that had its turn and then found no worker, be it that a filter or the policy left none or
        that they were full, and tell when to come again."""
        seconds = self._retry_after_s(turn.ticket) if error.retry_after_s is None else error.retry_after_s
        self._refusal(error, seconds)

    def poke(self) -> None:
        """Something changed: look again in the next pass of the loop."""
        if self._queue:
            self._look_soon()

    def workers_changed(self) -> None:
        """One came, went or changed state: a look, even if nobody waits, since it tells when the last one went."""
        self._have_workers_changed = True
        self._look_soon()

    def reconfigure(self, settings: FlowSettings) -> None:
        """Go on with other bands, orders and bounds; whoever waits keeps waiting."""
        if settings == self._queue.settings:
            return
        self._queue.reconfigure(settings, self._timers.time())
        self._watch()
        self.poke()

    @property
    def head(self) -> Ticket | None:
        """The ticket whose turn is next; None where none waits."""
        return self._queue.head(self._timers.time())

    @property
    def waiting_ms(self) -> float:
        """Predicted milliseconds of computing that the waiting prompts need."""
        return sum(ticket.prefill_ms for ticket in self._waiting)

    def predicted_wait_ms(self, ticket: Ticket) -> float:
        """Until a new ticket's prompt would begin: those before it at the pace seen, then the work in flight."""
        drain_ms = _finite(self._room.drain_ms(ticket.adapter))
        return self._pace.gap_ms(ticket.prefill_ms) * self._queue.ahead_of(ticket) + drain_ms

    def _reason_at_once(self, ticket: Ticket, now: float) -> Release | None:
        room_ms = self._room.room_in_ms(ticket)
        self._note_workers(ticket.adapter, room_ms, now)
        if math.isnan(room_ms):
            return Release.NO_PREDICTION
        if room_ms > _NO_WAIT_MS or self._held_back_ms(ticket) > _NO_WAIT_MS:
            return None
        return Release.ROOM

    def _enqueue(self, ticket: Ticket, now: float) -> None:
        if ticket.adapter in self._no_worker_s:
            self._note_workers(ticket.adapter, self._room.drain_ms(ticket.adapter), now)
        since_s = min(self._no_worker_s.get(adapter, math.inf) for adapter in ("", ticket.adapter))
        if now >= since_s + self._queue.settings.worker_wait_ms / 1e3:
            raise self._no_worker(ticket)
        self._shed_hopeless(ticket)
        if not self._queue:
            self._progress_s = now
            self._pace.rested()
        try:
            displaced = self._queue.offer(ticket, now)
        except ResourceExhausted as full:
            raise self._refusal(full, self._retry_after_s(ticket)) from None
        for victim in displaced:
            lost = ResourceExhausted("a request of higher priority took its place", reason="displaced")
            self._fail(victim, self._refusal(lost, self._retry_after_s(victim)))

    def _shed_hopeless(self, ticket: Ticket) -> None:
        settings = self._queue.settings
        is_sheddable = self._queue.band_of(ticket).settings.is_sheddable
        factor = settings.sheddable_shed_factor if is_sheddable else settings.shed_factor
        if factor is None or ticket.ttft_slo_ms is None:
            return
        ttft_ms = self.predicted_wait_ms(ticket) + ticket.prefill_ms
        if ttft_ms > factor * ticket.ttft_slo_ms:
            message = f"the first token would take about {ttft_ms:.0f} ms"
            raise self._refusal(ResourceExhausted(message, reason="slo_out_of_reach"), self._retry_after_s(ticket))

    def _look_soon(self) -> None:
        if self._soon is None:
            self._soon = self._timers.call_soon(self._pass)

    def _pass(self) -> None:
        """Release at most one request, and see to it that there is a next look while any waits."""
        try:
            self._look()
        except Exception as error:
            # Who predicts may be a third party's. Others are not left to wait for a look that never comes.
            log.exception("a look at the queue failed")
            if (head := self._judged or self._queue.head(self._timers.time())) is not None:
                self._queue.remove(head)
                self._fail(head, Internal(f"the prediction failed: {type(error).__name__}", reason="unexpected"))
            self.poke()

    def _look(self) -> None:
        self._judged = None
        if self._soon is not None:
            # A timer and a poke in one pass of the loop are one look: a second one would be blind to the first's.
            self._soon.cancel()
            self._soon = None
        is_boundary = self._timers.time() >= self._boundary_s
        self._stop_timer()
        now = self._timers.time()
        for ticket in self._queue.expire(now):
            self._fail(ticket, self._expired(ticket, now))
        self._note_all_workers(now)
        if held := self._judge_heads(now, is_boundary):
            self._look_again(now, held)

    def _judge_heads(self, now: float, is_boundary: bool) -> Mapping[Ticket, float]:
        """Let the first one go that may, else give the predicted waits of all that may not."""
        held: dict[Ticket, float] = {}
        passed = _Passed(self._room.takers)
        num_busy, others_have_room = 0, False
        while (head := self._queue.head(now, passed)) is not None:
            self._judged = head
            if self._waiting[head].done():
                # Cancelled; its task has not run yet.
                self._queue.remove(head)
                self.poke()
                return {}
            wait_ms = held[head] = self._wait_ms(head)
            self._note_workers(head.adapter, wait_ms, now)
            if now >= self._give_up_s(head.adapter):
                self._fail_all(head.adapter)
                self.poke()
                return {}
            if (reason := self._reason(head, wait_ms, now, is_boundary)) is not None:
                self._release(head, reason, now)
                return {}
            if not head.adapter:
                break
            takers = self._room.takers(head.adapter)
            self._held_s.setdefault(takers, now)
            if not math.isinf(wait_ms):
                num_busy += 1
                others_have_room = others_have_room or self._have_others_room(head)
                if num_busy > _MOST_BUSY or not others_have_room:
                    break
            passed.takers.add(takers)
        else:
            # Nobody else waits: who comes next has not been held yet.
            self._progress_s = now
            self._held_s = {takers: self._held_s[takers] for takers in passed.takers}
        return held

    def _have_others_room(self, head: Ticket) -> bool:
        """There would be room but for its adapter."""
        return self._room.room_in_ms(replace(head, adapter="")) <= _NO_WAIT_MS

    def _note_workers(self, adapter: str, room_ms: float, now: float) -> None:
        if math.isinf(room_ms):
            self._no_worker_s.setdefault(adapter, now)
        else:
            self._no_worker_s.pop(adapter, None)

    def _note_all_workers(self, now: float) -> None:
        """Of what nobody waits for too, where nobody waits at all or workers have changed."""
        if self._have_workers_changed or not self._queue:
            self._have_workers_changed = False
            if len(self._no_worker_s) > _MOST_UNSERVED:
                kept = {"", *self._adapters}
                self._no_worker_s = {name: at_s for name, at_s in self._no_worker_s.items() if name in kept}
            for adapter in ("", *self._no_worker_s):
                self._note_workers(adapter, self._room.drain_ms(adapter), now)

    def _wait_ms(self, head: Ticket) -> float:
        """Predicted time until the head's band may use a worker's room; nan: not predicted."""
        room_ms = self._room.room_in_ms(head)
        return room_ms if math.isinf(room_ms) or math.isnan(room_ms) else max(room_ms, self._held_back_ms(head))

    def _held_back_ms(self, head: Ticket) -> float:
        """Until the least loaded worker's work has fallen to the share of the look-ahead its band may use."""
        band = self._queue.band_of(head)
        if not band.settings.hold_back:
            return 0.0
        return max(0.0, self._room.drain_ms(head.adapter) - band.ceiling * self._queue.settings.lookahead_ms)

    def _reason(self, head: Ticket, wait_ms: float, now: float, is_boundary: bool) -> Release | None:
        """Why the head goes now, or None."""
        if math.isnan(wait_ms):
            return Release.NO_PREDICTION
        if wait_ms <= _NO_WAIT_MS:
            self._is_ahead = False
            return Release.BOUNDARY if is_boundary else Release.ROOM
        if math.isinf(wait_ms):
            return None
        if now >= self._held_since_s(head) + self._max_hold_s:
            self._is_ahead = False
            return Release.MAX_HOLD
        if not self._is_ahead and head.latest_start_s - _SLO_MARGIN_S <= now <= head.latest_start_s:
            self._is_ahead = True
            return Release.SLO
        return None

    def _release(self, ticket: Ticket, reason: Release, now: float) -> None:
        self._queue.take(ticket, now)
        self._held_s.pop(self._room.takers(ticket.adapter), None)
        self._pace.released(now, was_backlog=len(self._queue) > 0)
        self._progress_s = now
        waiting = self._waiting[ticket]
        if not waiting.done():
            waiting.set_result(reason)
        # Behind the released task's own step, so that the room is seen with it; a new arrival queues until then.
        self._soon = self._timers.call_soon(self._pass)

    def _look_again(self, now: float, held: Mapping[Ticket, float]) -> None:
        """When something may have come of the heads that wait, by their predicted waits."""
        self._boundary_s = now + min(held.values()) / 1e3
        at = min(self._boundary_s, now + _RECHECK_S, self._queue.next_expiry_s or math.inf)
        for head, wait_ms in held.items():
            slo_s = head.latest_start_s - _SLO_MARGIN_S
            at = min(
                at,
                math.inf if self._is_ahead or slo_s <= now else slo_s,
                self._give_up_s(head.adapter) if math.isinf(wait_ms) else self._held_since_s(head) + self._max_hold_s,
            )
        self._timer = self._timers.call_at(at, self._pass)

    def _held_since_s(self, head: Ticket) -> float:
        return min(self._progress_s, self._held_s.get(self._room.takers(head.adapter), math.inf))

    def _waits_no_more(self, adapter: str) -> None:
        """The hold of its workers ends with the last who waits for them."""
        self._adapters[adapter] -= 1
        if self._adapters[adapter]:
            return
        del self._adapters[adapter]
        takers = self._room.takers(adapter)
        if not any(self._room.takers(other) == takers for other in self._adapters):
            self._held_s.pop(takers, None)

    def _stop_timer(self) -> None:
        self._boundary_s = math.inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fail(self, ticket: Ticket, error: OmniError) -> None:
        waiting = self._waiting[ticket]
        if not waiting.done():
            waiting.set_exception(error)

    def _fail_all(self, adapter: str) -> None:
        """No worker has taken work for as long as a head may be held; for an adapter, none of those that serve it."""
        for ticket, waiting in list(self._waiting.items()):
            if adapter in ("", ticket.adapter) and not waiting.done() and self._queue.remove(ticket):
                waiting.set_exception(self._no_worker(ticket))

    def _expired(self, ticket: Ticket, now: float) -> OmniError:
        if now >= ticket.deadline_s:
            self._metrics.dropped.labels("deadline").inc()
            return DeadlineExceeded("the request's time is over", reason="deadline")
        message = f"no worker had room within {self._queue.settings.ttl_s:g} s"
        return self._refusal(ResourceExhausted(message, reason="queue_ttl"), self._retry_after_s(ticket))

    def _no_worker(self, ticket: Ticket) -> OmniError:
        error = Unavailable("no worker takes work", reason="no_decode_worker")
        if ticket.adapter and "" not in self._no_worker_s:
            message = f"no decode worker that serves the adapter {ticket.adapter!r} takes work"
            error = Unavailable(message, reason="no_adapter")
        return self._refusal(error, _NO_WORKER_RETRY_S)

    def _refusal(self, error: OmniError, retry_after_s: float) -> OmniError:
        error.retry_after_s = retry_after_s
        self._metrics.dropped.labels(error.reason).inc()
        return error

    def _retry_after_s(self, ticket: Ticket) -> float:
        """When the queue of today would be empty, at most its TTL."""
        gap_ms = self._pace.gap_ms(ticket.prefill_ms)
        drain_ms = gap_ms * len(self._queue) + _finite(self._room.drain_ms(ticket.adapter))
        return min(self._queue.settings.ttl_s, drain_ms / 1e3)

    def _turn(self, ticket: Ticket, offered_s: float, reason: Release, *, has_waited: bool) -> Turn:
        released_s = self._timers.time()
        waited_s = max(0.0, released_s - offered_s)
        self._metrics.hold.observe(waited_s)
        self._metrics.releases[reason].inc()

        def ended(tokens: int) -> None:
            excess = OUTPUT_WEIGHT * (tokens - ticket.output_tokens)
            # What is given back weighs as much as when it was charged.
            self._queue.settle(ticket, excess, released_s if excess < 0 else self._timers.time())

        return Turn(waited_s * 1e3, has_waited, reason, ticket, ended)

    def _watch(self) -> None:
        queue = self._queue
        bands = {b.settings.name: (_reader(b, "requests"), _reader(b, "tenants")) for b in queue.bands}
        self._metrics.watch(self._saturation, lambda: queue.size_bytes, bands)

    def _saturation(self) -> float:
        drain_ms, lookahead_ms = self._room.drain_ms(), self._queue.settings.lookahead_ms
        return drain_ms / lookahead_ms if lookahead_ms else float(drain_ms > 0)

    def _give_up_s(self, adapter: str) -> float:
        """When those who wait are refused for want of any worker that takes their work."""
        return self._no_worker_s.get(adapter, math.inf) + max(
            self._max_hold_s, self._queue.settings.worker_wait_ms / 1e3
        )

    @property
    def _max_hold_s(self) -> float:
        return self._queue.settings.max_hold_ms / 1e3


def _reader(band: object, name: str) -> Callable[[], float]:
    return lambda: getattr(band, name)


def _finite(value_ms: float) -> float:
    return value_ms if math.isfinite(value_ms) else 0.0


def _nothing(tokens: int) -> None:
    """A turn that has ended already."""
