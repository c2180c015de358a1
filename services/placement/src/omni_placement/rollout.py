"""Layouts on their way into engines: who holds what, the rounds they were sent, and what they say of them.

    attach(held) --> order: rounds from `held` to the layout in force --> acks --> applied | failed | overdue
    publish      --> a worker without an order under way gets the next one; any other stream ends, and its worker
                     attaches anew with what it holds

Only what a worker says it holds is believed, so that a restart of either side needs no recovery of its own.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from weakref import WeakValueDictionary

from omni_common.errors import FailedPrecondition
from omni_placement.book import Exclusions, LayoutBook, Outcome, Published
from omni_placement.layout import Layout, Topology
from omni_placement.load.book import GroupName
from omni_placement.migration import Round, apply_rounds, rounds
from omni_placement.outlines import filled, outline, same_outline, under
from omni_placement.session import Ack, Failure, Order, Progress, Session
from omni_placement.unbroken import Unbroken

log = logging.getLogger(__name__)


class Rollout:
    """Sessions by group, over the layouts in force. `clock` is monotonic; a round may take `round_timeout_s`."""

    def __init__(
        self,
        layouts: LayoutBook,
        clock: Callable[[], float],
        round_timeout_s: float,
        configured: Mapping[str, Topology],
        forget_after_s: float,
        on_forgotten: Callable[[GroupName], object] = lambda name: None,
    ) -> None:
        """`configured` are topologies by model; they fill in what a group's worker does not tell. A group whose worker
        has been away for `forget_after_s` makes room for another one where there is none; `on_forgotten` is told."""
        self._layouts, self._clock, self._round_timeout_s = layouts, clock, round_timeout_s
        self._configured, self._forget_after_s = configured, forget_after_s
        self._on_forgotten = on_forgotten
        self._started_s = clock()
        self._left_s: dict[GroupName, float] = {}
        self._sessions: dict[GroupName, Session] = {}
        self._locks: WeakValueDictionary[GroupName, asyncio.Lock] = WeakValueDictionary()
        self._work = Unbroken()

    def resolve(self, model: str, group: str) -> GroupName:
        """The group meant where none is named: the only one with a worker, else as `LayoutBook.resolve`."""
        live = [name for name in self._sessions if name.model == model]
        if not group and len(live) == 1:
            return live[0]
        return self._layouts.resolve(model, group)

    def session(self, name: GroupName) -> Session | None:
        return self._sessions.get(name)

    def held(self, name: GroupName) -> Layout:
        """What the group's worker holds, else the layout in force. Raises `NotFound` where there is neither."""
        session = self._sessions.get(name)
        return session.held if session else self._layouts.get(name).layout

    async def attach(self, name: GroupName, worker_id: str, held: Layout, *, is_fresh: bool = False) -> Session:
        """Begin a session; the first order is there when this returns. A group without a layout gets the one held.

        `is_fresh` says that the engine holds what it started with, and so has all its ranks.

        Raises:
            FailedPrecondition: another worker holds the group, the ranks have another shape than the layout in force,
                or an expert is on failed ranks only.
            ResourceExhausted: the bound on groups is reached.
        """
        task = self._work.start(self._attach(name, worker_id, held, is_fresh))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._detach_unseen)
            raise

    async def _attach(self, name: GroupName, worker_id: str, held: Layout, is_fresh: bool) -> Session:
        async with self._lock(name):
            before = self._sessions.get(name)
            if before is not None and before.worker_id != worker_id:
                message = f"group {name.group!r} of model {name.model!r} is held by worker {before.worker_id!r}"
                raise FailedPrecondition(message, field="worker_id", reason="group_taken")
            if self._layouts.find(name) is None:
                await self._make_room()
                await self._layouts.publish(name, held, "held", "worker_held", outcome=Outcome.APPLIED)
            published = await self._described(name, held.topology)
            held = Layout(published.layout.topology, held.physical)
            if is_fresh:
                await self._layouts.readmit(name)
            silent = self._layouts.exclusions(name).silent
            steps, reached = await asyncio.to_thread(_way, held, published.layout, silent)
            if published.outcome is not Outcome.APPLIED or steps:
                await self._layouts.mark(name, published.version, Outcome.APPLYING)
            if before is not None:
                before.end()
            session = self._sessions[name] = Session(name, worker_id, held, is_fresh)
            self._send(session, held, replace(published, layout=reached), steps)
            return session

    def _detach_unseen(self, attached: asyncio.Task[Session]) -> None:
        if not attached.cancelled() and attached.exception() is None:
            self.detach(attached.result())

    def detach(self, session: Session) -> None:
        """The watch is gone; what was under way goes on with the next one."""
        if self._sessions.get(session.name) is session:
            del self._sessions[session.name]
            self._left_s[session.name] = self._clock()

    async def publish(
        self,
        name: GroupName,
        layout: Layout,
        solver: str,
        reason: str,
        *,
        exclusions: Exclusions | None = None,
        failed_version: int = 0,
        is_urgent: bool = False,
    ) -> Published:
        """Put a layout in force and order the worker to it. Experts of a rank may get other slots than in `layout`.

        Goes to its end even if the caller is cancelled, so that what is saved and what is in force stay the same.

        Raises:
            FailedPrecondition: a migration is under way, which only what is urgent overtakes; or an expert is on
                failed ranks only.
            ResourceExhausted: the bound on groups is reached.
        """
        return await self._work.run(self._publish(name, layout, solver, reason, exclusions, failed_version, is_urgent))

    async def _publish(
        self,
        name: GroupName,
        layout: Layout,
        solver: str,
        reason: str,
        exclusions: Exclusions | None,
        failed_version: int,
        is_urgent: bool,
    ) -> Published:
        async with self._lock(name):
            session = self._sessions.get(name)
            steps: tuple[Round, ...] = ()
            silent = (exclusions or self._layouts.exclusions(name)).silent
            is_overtaken = session is not None and session.order is not None
            if is_overtaken and not is_urgent:
                message = f"version {self._layouts.get(name).version} is being applied"
                raise FailedPrecondition(message, field="publish", reason="migration_in_flight", retry_after_s=1.0)
            if session is not None and (held := under(layout.topology, session.held)) is not None:
                steps, layout = await asyncio.to_thread(_way, held, layout, silent)
            else:
                held, is_overtaken = layout, True
            published = await self._layouts.publish(
                name,
                layout,
                solver,
                reason,
                outcome=Outcome.APPLYING if session else Outcome.NONE,
                exclusions=exclusions,
                failed_version=failed_version,
            )
            if session is not None and is_overtaken:
                self.end(session)
            elif session is not None:
                self._send(session, held, published, steps)
            return published

    async def ack(self, ack: Ack) -> Progress | None:
        """Take a worker's word on its order; None where it was known. A failure is for the caller to recover from.

        Raises:
            FailedPrecondition: this worker has no such order under way.
            InvalidRequest: a version or a count of rounds that cannot be.
        """
        session = self._sessions.get(ack.name)
        if session is None or session.worker_id != ack.worker_id:
            message = f"worker {ack.worker_id!r} watches no layouts of the group"
            raise FailedPrecondition(message, field="worker_id", reason="unknown_migration")
        progress = session.advance(ack)
        if progress is not None:
            session.deadline_s = self._clock() + self._round_timeout_s
            if ack.outcome is Outcome.APPLIED:
                # A save that is left while it runs would meet the next one.
                await self._work.run(self._layouts.mark(ack.name, ack.layout_version, Outcome.APPLIED, session.held))
        return progress

    def overdue(self) -> Iterator[Failure]:
        """Orders of which nothing was heard for longer than a round may take, each looked at when it is its turn:
        what is done about those before takes a while, in which others may be carried out."""
        for s in list(self._sessions.values()):
            if s.order is not None and s.deadline_s < self._clock():
                yield Failure(s.name, s.order.published.version, s.held, frozenset(), "no word of a round in time")

    def end(self, session: Session) -> None:
        """End a worker's stream, so that it attaches anew with what it holds."""
        session.end()
        self.detach(session)

    def close(self) -> None:
        """End all sessions."""
        for session in list(self._sessions.values()):
            self.end(session)

    async def settle(self) -> None:
        """Wait for publications under way."""
        await self._work.settle()

    async def _make_room(self) -> None:
        """Forget the group whose worker has been away for longest, if that is long enough and there is no room."""
        if not self._layouts.is_full:
            return
        away = {
            name: self._clock() - self._left_s.get(name, self._started_s)
            for name in self._layouts.names()
            if name not in self._sessions and self._layouts.history(name).had_worker
        }
        longest = max(away, key=lambda name: away[name], default=None)
        if longest is not None and away[longest] >= self._forget_after_s:
            log.info("group forgotten", extra={"model": longest.model, "group": longest.group})
            await self._layouts.forget(longest)
            self._left_s.pop(longest, None)
            self._on_forgotten(longest)

    async def _described(self, name: GroupName, told: Topology) -> Published:
        """The layout in force, its topology filled in with what the worker tells and nobody has configured."""
        known = self._layouts.get(name)
        mine = known.layout.topology
        if not same_outline(mine, told):
            message = (
                f"the worker has {outline(told)}, layout {known.version} of the group {outline(mine)}; "
                "publish a plan of the worker's topology, or name another group"
            )
            raise FailedPrecondition(message, field="held.topology", reason="other_topology")
        merged = filled(mine, told)
        configured = self._configured.get(name.model)
        if configured is not None and same_outline(configured, told):
            merged = filled(configured, merged)
        return known if merged == mine else await self._layouts.describe(name, merged)

    def _send(self, session: Session, start: Layout, published: Published, steps: tuple[Round, ...]) -> None:
        order = Order(secrets.token_hex(8), published, steps, self._layouts.exclusions(session.name).silent)
        session.send(order, start, self._clock() + self._round_timeout_s)

    def _lock(self, name: GroupName) -> asyncio.Lock:
        """One at a time changes what a group is ordered to; kept for as long as anyone holds it."""
        return self._locks.setdefault(name, asyncio.Lock())


def _way(held: Layout, target: Layout, failed_ranks: frozenset[int]) -> tuple[tuple[Round, ...], Layout]:
    """The rounds, and the layout they end at: the target but for the order of slots within a rank."""
    steps = rounds(held, target, failed_ranks)
    return steps, apply_rounds(held, steps)
