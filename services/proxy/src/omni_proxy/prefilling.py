"""The prefill leg of one sequence: on one worker, on another where that fails, on a second beside it where it is late.

first worker --answer---------------------------------------> done
     | late, and the budget holds a hedge      \\ fails
     +--> second worker: the first answer wins   +--> another worker, else decode computes the prompt
"""

import asyncio
from dataclasses import dataclass

from omni_common.errors import OmniError, Unavailable
from omni_proxy.course import FINAL, Course, Lease
from omni_proxy.foresight import Computing
from omni_proxy.patience import patience
from omni_proxy.ports import PrefillAnswer, PrefillOrder, PrefillPort
from omni_proxy.scheduling.decision import Decision
from omni_proxy.worker import Member, Worker


@dataclass(frozen=True, slots=True)
class Prefilled:
    """`predicted_cached_tokens`: what was foreseen of the answer's `cached_tokens`."""

    answer: PrefillAnswer
    worker: Worker
    port: PrefillPort
    predicted_cached_tokens: int

    def give_up(self) -> bool:
        """Nobody will pull the blocks. True if there was a lease to end."""
        if self.answer.kv_handle is None:
            return False
        self.port.release(self.answer.kv_handle.lease_id)
        return True


class Prefilling:
    """Runs prefill legs of one sequence. Cancelling ends all that are under way."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self._loop = asyncio.get_running_loop()

    async def answer(self) -> PrefillAnswer | Decision:
        """What a prefill worker answered; the decision for a decode worker that is to compute the prompt itself.

        Raises:
            OmniError: the prompt cannot be computed anywhere.
        """
        course = self._course
        fleet, record = course.scheduler.fleet, course.record
        for _ in range(course.scheduler.limits.max_attempts):
            decision = course.decide(may_prefill=True)
            record.decision = decision.reason
            record.predicted_ttft_ms = decision.prediction.ttft_ms
            member = fleet.get(decision.prefill) if decision.prefill else None
            if member is None or member.prefill is None:
                break
            try:
                done = await self._on(member, decision.prediction.computed_ms)
            except OmniError as error:
                if error.code in FINAL:
                    raise
                course.count_retry("prefill")
                continue
            finally:
                course.poke()
            course.scheduler.metrics.decided(decision)
            self._note(done)
            return done.answer
        course.scheduler.metrics.decided(decision)
        return decision

    async def _on(self, member: Member, predicted_ms: float) -> Prefilled:
        """The answer of `member`, or of a hedge. Raises the `OmniError` of the leg that failed last."""
        metrics = self._course.scheduler.metrics.health
        patience_ms = self._course.scheduler.hedging.patience_ms(predicted_ms)
        if patience_ms is None:
            with self._course.foresight.compute_on(member.worker, 0) as computing:
                return await self._leg(member, predicted_ms, computing)
        began, first = self._loop.time(), self._apart(member, predicted_ms)
        legs = {first: "first"}
        chosen: asyncio.Task[Prefilled] | None = None
        try:
            done, _ = await asyncio.wait(legs, timeout=patience_ms / 1e3)
            if not done and (second := self._second(member)) is not None:
                legs[self._apart(*second)] = "second"
                self._course.record.is_hedged = True
            winner = await _first(set(legs))
            if len(legs) > 1:
                metrics.hedges.labels(legs[winner] if _has_answer(winner) else "neither").inc()
                if not first.done():
                    # It would have taken at least this long.
                    self._saw(predicted_ms, began)
            answer, chosen = winner.result(), winner
            return answer
        finally:
            await self._end(legs, chosen)

    def _second(self, first: Member) -> tuple[Member, float] | None:
        """A worker for a hedge, and its predicted milliseconds; None if the budget or the fleet has no room for one."""
        course, hedging = self._course, self._course.scheduler.hedging
        if not hedging.take():
            return None
        try:
            decision = course.decide(may_prefill=True, beside=first.worker.id)
        except Unavailable:
            hedging.give_back()
            return None
        member = course.scheduler.fleet.get(decision.prefill) if decision.prefill else None
        if member is None:
            hedging.give_back()
            return None
        return member, decision.prediction.computed_ms

    def _note(self, done: Prefilled) -> None:
        record, answer = self._course.record, done.answer
        record.predicted_cached_tokens = done.predicted_cached_tokens
        record.prefill_worker = done.worker.id
        record.cached_tokens = answer.cached_tokens
        record.queue_ms, record.prefill_ms = answer.timings.queue_ms, answer.timings.compute_ms
        if answer.kv_handle is not None:
            self._course.lease = Lease(answer.kv_handle, done.worker, done.port)

    async def _end(self, legs: "dict[asyncio.Task[Prefilled], str]", chosen: "asyncio.Task[Prefilled] | None") -> None:
        """Cancel what still runs, and free what was computed for nobody."""
        for leg in legs:
            leg.cancel()
        try:
            await asyncio.gather(*legs, return_exceptions=True)
        except asyncio.CancelledError:
            chosen = None
            raise
        finally:
            for leg in legs:
                if leg is not chosen and _has_answer(leg) and leg.result().give_up():
                    self._course.scheduler.metrics.releases.inc()

    def _apart(self, member: Member, predicted_ms: float) -> "asyncio.Task[Prefilled]":
        """A leg beside which others may run. Charged at once: who is scheduled before its first step has to see it."""
        computing = self._course.foresight.compute_on(member.worker, 0)
        computing.__enter__()
        leg = asyncio.ensure_future(self._leg(member, predicted_ms, computing))
        leg.add_done_callback(lambda _: computing.__exit__())  # also where it is cancelled before its first step
        return leg

    async def _leg(self, member: Member, predicted_ms: float, computing: Computing) -> Prefilled:
        port, worker, foresight = member.prefill, member.worker, self._course.foresight
        if port is None:
            raise Unavailable("the worker takes no prompts any more", reason="role")
        order = self._order(worker)
        # A later look would find the prompt itself on its way there.
        foreseen = foresight.cached_tokens(worker)
        leg_trace = self._course.trace.leg("proxy.prefill", lambda: foresight.attributes(worker))
        began = self._loop.time()
        fleet = self._course.scheduler.fleet
        attempting = fleet.attempt(worker.id, self._course.job.adapter)
        with attempting as attempt, foresight.mark(worker) as mark, leg_trace as leg:
            try:
                async with patience(fleet.health.settings, predicted_ms / 1e3, lambda: port.is_silent):
                    answer = await port.prefill(order, self._course.left_s(), leg.headers)
            except OmniError as error:
                attempt.failed(error)
                self._course.excluded.add(worker.id)
                raise
            attempt.succeeded()
            mark.computed()
            self._saw(predicted_ms, began)
            seen = computing.computed(answer.cached_tokens, answer.timings.queue_ms + answer.timings.compute_ms)
            leg.set({"omni.cached_tokens": answer.cached_tokens, "omni.queue_ms": answer.timings.queue_ms})
        if seen is not None:
            self._course.scheduler.metrics.predicted("prefill", seen)
        return Prefilled(answer, worker, port, foresight.compare(worker, answer.cached_tokens, foreseen))

    def _saw(self, predicted_ms: float, began: float) -> None:
        self._course.scheduler.hedging.seen(predicted_ms, (self._loop.time() - began) * 1e3)

    def _order(self, worker: Worker) -> PrefillOrder:
        return PrefillOrder(
            self._course.job.request_id,
            self._course.scheduler.model,
            self._course.job.prompt,
            self._course.job.sampling,
            self._course.foresight.keys(worker.block_size),
            self._course.scheduler.proxy_id,
            self._course.foresight.uncached_tokens(worker),
            self._course.job.cache_salt,
            self._course.job.adapter,
        )


async def _first(legs: "set[asyncio.Task[Prefilled]]") -> "asyncio.Task[Prefilled]":
    """The first leg with an answer, or the last one to fail."""
    while True:
        done, running = await asyncio.wait(legs, return_when=asyncio.FIRST_COMPLETED)
        answered = [leg for leg in done if _has_answer(leg)]
        if answered or not running:
            return answered[0] if answered else done.pop()
        legs = running


def _has_answer(leg: "asyncio.Task[Prefilled]") -> bool:
    return leg.done() and not leg.cancelled() and leg.exception() is None
