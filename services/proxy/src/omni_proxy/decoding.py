"""The decode legs of one sequence: one worker after another, each going on where the last one broke off.

submit -> start -> tokens ... finish
   ^                  | breaks, is refused, or the worker goes quiet
   +------------------+ from prompt + tokens sent; or from the prompt, where draws must be repeated to go on alike
"""

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from omni_common.errors import Code, OmniError, Unavailable
from omni_proxy.attempt import Attempt
from omni_proxy.continuation import Continuation, continuation, resumes_by_replay, resumes_exactly
from omni_proxy.course import FINAL, Course
from omni_proxy.feed import End, Feed
from omni_proxy.foresight import Computing
from omni_proxy.ledger import Charge
from omni_proxy.marks import Mark
from omni_proxy.patience import patience
from omni_proxy.ports import FinishReason, KvHandle, LogprobRow, SequenceStart, Submission
from omni_proxy.sequence import TokenBatch
from omni_proxy.worker import Member, Worker

ENDED = frozenset({FinishReason.STOP, FinishReason.LENGTH})
_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
_LOOK_AGAIN_S = 0.25
_DIVERGED = "replay_differs"
_HOLDER_QUIET = "holder_stalled"


class Decoding:
    """Runs one leg at a time. `chosen` is a worker that a decision named already."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self._mark: Mark | None = None
        self._computing: Computing | None = None
        self._charge: Charge | None = None
        self._attempt: Attempt | None = None
        self._may_replay = True
        self.chosen: str | None = None
        self.predicted_ms = 0.0
        """Until the next leg's first token."""
        self.left_out = 0
        """Tokens that a replay still has to repeat."""
        self._unheard: Worker | None = None
        """Asked last, and not a token came from it."""

    async def submitted(self, stack: ExitStack) -> tuple[Feed, Member]:
        """A feed of a decode worker that took the sequence; `stack` settles and aborts it.

        Raises:
            OmniError: nobody takes it, or nobody came in time to go on with it.
        """
        course, last = self._course, None
        give_up = course.now() + course.scheduler.limits.resume_timeout_s
        may_wait = bool(course.sent or course.lease or course.record.retries)
        while True:
            try:
                member = self._member()
            except Unavailable as unavailable:
                if not may_wait or last is not None:
                    raise last or unavailable from None
                if course.excluded:
                    # Nobody else is there: a worker that broke once is better than none.
                    course.excluded.clear()
                else:
                    await self._fleet_change(give_up, unavailable)
                continue
            with ExitStack() as held:
                try:
                    feed = self._submit_to(member, held)
                except OmniError as error:
                    last = error
                    course.excluded.add(member.worker.id)
                    continue
                stack.push(held.pop_all())
            return feed, member

    async def first(self, feed: Feed) -> None:
        """Until there is something, or the worker that holds the blocks it waits for counts as stuck."""
        lease, settings = self._course.lease, self._course.scheduler.fleet.health.settings
        if lease is None:
            return await feed.wait()
        try:
            async with patience(settings, self.predicted_ms / 1e3, lambda: lease.port.is_silent):
                await feed.wait()
        except Unavailable:
            feed.finish(End(error=Unavailable("the holder of the blocks has gone quiet", reason=_HOLDER_QUIET)))

    def taken(self, feed: Feed, worker: Worker) -> TokenBatch:
        """What has come since the last time."""
        tokens, rows = feed.take()
        if feed.start is not None:
            self._note_start(feed, worker)
        if tokens and self._attempt is not None:
            self._attempt.succeeded()
        if self.left_out:
            tokens, rows = self._leave_out(feed, tokens, rows)
        if tokens:
            if not self._course.sent:
                self._course.count_first_token(self._course.first_token)
            self.sent(tokens)
        finish = feed.end.finish_reason if feed.end is not None else None
        return TokenBatch(tokens, rows, finish if finish in ENDED else None)

    def sent(self, tokens: Sequence[int]) -> None:
        """The client has these, or is about to: an attempt that has to follow goes on after them."""
        if self._unheard is not None:
            self._course.answered_by(self._unheard)
            self._unheard = None
        self._course.sent.extend(tokens)
        if self._charge is not None:
            self._charge.received(len(tokens))

    def tell_health(self, end: End) -> None:
        """What the end of a broken leg says of its worker."""
        error, course = _error_of(end), self._course
        if error.reason == _HOLDER_QUIET and course.lease is not None:
            course.scheduler.fleet.health.silence(course.lease.worker.id, course.scheduler.fleet.now())
        elif error.reason != _DIVERGED and self._attempt is not None:
            self._attempt.failed(error)

    async def after_broken_leg(self, end: End, member: Member, fruitless: int) -> None:
        """Make ready for another leg, or raise what must not be tried again.

        `fruitless`: legs in a row, this one included, that brought no token.
        """
        error, course = _error_of(end), self._course
        may_compute = course.lease is not None and _cannot_pull(end)
        if not self._keeps_lease(end):
            course.give_up_lease()
        if error.code in FINAL:
            raise error
        if error.reason == _DIVERGED:
            course.scheduler.metrics.health.replays.labels("differs").inc()
            self._may_replay = False
            course.note_inexact()
            return
        if not fruitless:
            # Those that broke earlier have had the time of a few tokens to recover.
            course.excluded.clear()
        if error.reason != _HOLDER_QUIET and not may_compute:
            course.excluded.add(member.worker.id)
        if end.rejected and not self._has_another():
            if not course.sent:
                raise error
            # The client has a token: a full worker is asked again rather than the stream ended.
            await asyncio.sleep(min(_PAUSE_S * 4 ** (fruitless - 1), _LONGEST_PAUSE_S))
        if not course.sent:
            course.count_retry("decode")
            return
        course.record.resumes += 1
        course.scheduler.metrics.resumes.inc()
        if not resumes_exactly(course.job.sampling):
            course.note_inexact()

    def _member(self) -> Member:
        """The worker decided on, or another one if that takes no work any more."""
        course, fleet = self._course, self._course.scheduler.fleet
        chosen, self.chosen = self.chosen, None
        member = fleet.get(chosen) if chosen and chosen not in course.excluded else None
        if member is None or fleet.refusal(member) is not None:
            decision = course.decide(may_prefill=False)
            foreseen = decision.prediction
            self.predicted_ms = foreseen.computed_ms + foreseen.transfer_ms + foreseen.step_ms
            member = fleet.get(decision.decode)
        if member is None or member.decode is None:
            raise Unavailable("the chosen decode worker has left", reason="no_decode_worker")
        return member

    async def _fleet_change(self, give_up: float, unavailable: Unavailable) -> None:
        """Wait for one, or some time: who was ejected comes back without a sign."""
        now, give_up = self._course.now(), min(give_up, self._course.job.deadline)
        if now >= give_up:
            raise unavailable
        with suppress(TimeoutError):
            async with asyncio.timeout(min(_LOOK_AGAIN_S, give_up - now)):
                await self._course.scheduler.fleet.changed()

    def _submit_to(self, member: Member, stack: ExitStack) -> Feed:
        course, worker, decode = self._course, member.worker, member.decode
        assert decode is not None
        handle, after = self._pulled(worker), self._continued()
        foresight, fleet = course.foresight, course.scheduler.fleet
        generated = after.num_output_tokens
        left = max(1, course.output_tokens - generated)
        leg = stack.enter_context(
            course.trace.leg(
                "proxy.decode", lambda: {"omni.worker_id": worker.id} if handle else foresight.attributes(worker)
            )
        )
        attempt = self._attempt = stack.enter_context(fleet.attempt(worker.id, course.job.adapter))
        if handle is not None:
            self._computing = None
            self._charge = stack.enter_context(fleet.ledger.charge(worker.id, None, left))
        else:
            self._computing = stack.enter_context(foresight.compute_on(worker, left, generated))
            self._charge = self._computing.charge
        submission = Submission(
            request_id=course.job.request_id,
            model=course.scheduler.model,
            token_ids=after.token_ids,
            num_output_tokens=generated,
            sampling=after.sampling,
            kv_handle=handle,
            traceparent=leg.headers.get("traceparent", ""),
            deadline_ms=max(1, int(course.left_s() * 1000)),
            uncached_tokens=0 if handle else foresight.uncached_tokens(worker, generated),
            predicted_ms=self.predicted_ms,
            cache_salt=course.job.cache_salt,
            adapter=course.job.adapter,
        )
        try:
            feed = decode.submit(submission)
        except OmniError as error:
            attempt.failed(error)
            raise
        if handle is None:
            course.give_up_lease()
        elif course.lease is not None:
            course.lease.reader = feed
        stack.callback(decode.abort, feed)
        self._mark = None if handle else stack.enter_context(foresight.mark(worker))
        course.record.decode_worker = worker.id
        self._unheard = worker
        return feed

    def _keeps_lease(self, end: End) -> bool:
        """The blocks of a broken leg are for another worker: this one refused them, or never heard of them."""
        lease = self._course.lease
        if lease is None:
            return False
        if end.rejected:
            lease.reader = None
        return not lease.is_told and not _cannot_pull(end) and _error_of(end).reason != _HOLDER_QUIET

    def _pulled(self, worker: Worker) -> KvHandle | None:
        """Of the blocks that wait for the worker, if it can pull them and they still are all it needs."""
        lease = self._course.lease
        if (
            lease is None
            or not worker.can_pull_from(lease.worker, self._course.job.adapter)
            or len(self._course.sent) > 1
        ):
            return None
        return lease.handle

    def _continued(self) -> Continuation:
        course = self._course
        is_replay = len(course.sent) > 0 and self._may_replay and resumes_by_replay(course.job.sampling)
        self.left_out = len(course.sent) if is_replay else 0
        generated = () if is_replay else course.sent
        return continuation(course.job.prompt, generated, course.job.sampling, course.first_token)

    def _leave_out(
        self, feed: Feed, tokens: list[int], rows: Sequence[LogprobRow]
    ) -> tuple[list[int], Sequence[LogprobRow]]:
        """What a replay says beyond what the client has. Its end is an error if it does not repeat that."""
        sent, count = self._course.sent, min(len(tokens), self.left_out)
        at = len(sent) - self.left_out
        is_same = tokens[:count] == sent[at : at + count]
        self.left_out -= count
        if not is_same or (self.left_out and feed.end is not None and feed.end.finish_reason in ENDED):
            feed.finish(End(error=Unavailable("the engine did not repeat what it said", reason=_DIVERGED)))
            return [], ()
        if not self.left_out:
            self._course.scheduler.metrics.health.replays.labels("same").inc()
        return tokens[count:], rows[count:]

    def _note_start(self, feed: Feed, worker: Worker) -> None:
        """The pull is over: the worker has ended the lease, or did without the blocks."""
        start, feed.start = feed.start, None
        assert start is not None
        course, record = self._course, self._course.record
        self._learn(start, worker)
        if course.lease is None and not course.sent:
            record.cached_tokens = start.cached_tokens
            record.predicted_cached_tokens = course.foresight.compare(worker, start.cached_tokens)
        if course.lease is not None and start.fell_back:
            record.fell_back = True
            course.scheduler.metrics.health.fallbacks.inc()
            course.lease.reader = None
        course.give_up_lease()
        record.queue_ms += start.timings.queue_ms
        record.transfer_ms += start.timings.transfer_ms
        if self._mark is not None:
            self._mark.computed()
        else:
            course.foresight.pulled(worker)

    def _learn(self, start: SequenceStart, worker: Worker) -> None:
        """What the leg's first words say of the workers' times."""
        course, timings = self._course, start.timings
        fleet, metrics = course.scheduler.fleet, course.scheduler.metrics
        if self._computing is not None:
            seen = self._computing.computed(start.cached_tokens, timings.queue_ms + timings.compute_ms)
            course.record.prefill_ms += timings.compute_ms
            course.poke()
            if seen is not None:
                metrics.predicted("prefill", seen)
        elif course.lease is not None and start.pulled_tokens and not start.fell_back:
            slots = fleet.columns.get(course.lease.worker.id), fleet.columns.get(worker.id)
            if slots[0] is not None and slots[1] is not None:
                moved = fleet.times.saw_transfer(slots[0], slots[1], start.pulled_tokens, timings.transfer_ms)
                if moved is not None:
                    metrics.predicted("transfer", moved)

    def _has_another(self) -> bool:
        try:
            self._course.decide(may_prefill=False)
        except Unavailable:
            return False
        return True


def _cannot_pull(end: End) -> bool:
    """The worker will not have these blocks; the prompt it may well compute. Without the adapter it does neither."""
    error = end.error
    return end.rejected and error is not None and error.code is Code.FAILED_PRECONDITION and error.field != "adapter"


def _error_of(end: End) -> OmniError:
    return end.error or Unavailable(f"the engine ended the sequence: {end.finish_reason}", reason="engine_error")
